"""The judge: its prompt, the pass that reads its attention, and what it says."""
