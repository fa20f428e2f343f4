"""Scores: ScienceQA's table, by comparing the letters of the choices or by generation."""
