"""Datasets x models x methods x seeds, and the pages made from their results."""
