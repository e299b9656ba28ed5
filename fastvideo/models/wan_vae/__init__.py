"""The parts of Wan's VAE: norms, causal convolutions, blocks and the two nets."""
