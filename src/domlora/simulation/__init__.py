"""People whose click probabilities are known ask a server, click, and say so; the truth lies beside the estimate."""
