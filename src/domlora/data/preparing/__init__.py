"""The steps of preparation, each by itself."""
