"""Published data sets: one function each from raw files to a table."""
