"""Tuning with an equal budget."""
