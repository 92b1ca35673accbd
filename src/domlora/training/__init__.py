"""One loop, four methods: which parameters move, and which rows are read."""
