"""Text files to Parquet, line by line where a line is odd."""
