"""The embedded demo: drawn problems in ScienceQA's layout, a tokenizer, and a tiny model that needs no download."""
