"""Discriminators of a denoiser's features, one family per file; only trainings have them."""
