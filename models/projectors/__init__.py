"""Projectors, one kind of computation a file; models/projector.py makes them."""
