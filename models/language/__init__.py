"""Language models, one family a file."""
