"""Left wing: files to batches; the only place for columnar libraries."""
