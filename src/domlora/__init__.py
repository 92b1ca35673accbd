"""Many domains, one click model, a small low-rank adapter for each domain."""
