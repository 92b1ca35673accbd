"""Low-rank adapters for many domains beside any nn.Linear; knows torch and errors only."""
