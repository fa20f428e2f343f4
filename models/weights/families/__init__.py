"""One file for each family of language models: its names in files, and its config.json, both ways."""
