"""One store for replicas on many machines: a place that all of them read, and who writes to it."""
