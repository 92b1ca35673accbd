"""One training on many processes: the only room that talks to torch.distributed."""
