"""Weights in and out: Hugging Face folders, GGUF, PEFT adapters, the embedded model."""
