"""What there is to say of a prepared dataset."""
