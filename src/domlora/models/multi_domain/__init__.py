"""Models that read the domain of each row."""
