"""Vision towers, one family a file."""
