"""Where batches come from: clips rendered as they are needed, or latents stored once."""
