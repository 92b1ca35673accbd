"""Right wing: building blocks in torch, with no knowledge of files or losses."""
