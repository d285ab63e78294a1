"""The decoder, its token log-probs, and HF folders in and out."""
