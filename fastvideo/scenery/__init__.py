"""What the worlds are made of: scenes, their drawing and filming, their words and their readers."""
