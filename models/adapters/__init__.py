"""Adapters: the small parts that learn while everything around them is frozen."""
