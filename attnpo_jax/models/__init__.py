"""The decoder, its token log-probs, and Hugging Face checkpoints in and out."""
