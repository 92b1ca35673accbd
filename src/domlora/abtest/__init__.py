"""Experiments on live traffic: who gets which arm, what was shown, what happened, and what follows from it."""
