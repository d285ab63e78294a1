"""Attention, and who computes it."""
