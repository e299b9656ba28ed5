"""One file for each verb; arguments are read and refused before torch is imported."""
