"""Denoising transformers, one family per file."""
