"""Where parameters, gradients and optimizer states live, one file per way to place them."""
