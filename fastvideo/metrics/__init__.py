"""Measures of a clip or a model, one per file."""
