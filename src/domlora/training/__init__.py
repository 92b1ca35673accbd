"""One loop, many methods: which parameters move, and which rows are read."""
