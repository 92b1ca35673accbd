"""A bundle as graphs that answer without torch."""
