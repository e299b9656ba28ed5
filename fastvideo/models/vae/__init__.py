"""Video autoencoders, one family per file."""
