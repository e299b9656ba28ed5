"""Networks by what they do: denoisers, autoencoders, text encoders."""
