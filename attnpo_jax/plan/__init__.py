"""Plans a run on accelerators that are not there: memory, traffic and time, from real programs."""
