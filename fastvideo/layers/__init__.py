"""Small modules that several networks share."""
