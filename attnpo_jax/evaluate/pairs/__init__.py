"""Held-out preference pairs: does the model's implicit reward prefer the chosen responses."""
