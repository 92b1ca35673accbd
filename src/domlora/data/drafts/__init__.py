"""What a look at a log says about its columns."""
