"""From labels and probabilities to one table: a line a domain, then totals."""
