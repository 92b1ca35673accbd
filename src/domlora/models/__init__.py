"""Click models: ids, dense columns and a domain in, one logit a row out."""
