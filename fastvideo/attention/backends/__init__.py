"""Ways to compute attention, one per file; each says what it cannot serve."""
