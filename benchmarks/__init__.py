"""Speed and memory on the embedded model, each beside the machine's own matrix-product rate.

Run `python -m benchmarks` from a checkout; docs/performance.md says what the figures mean.
"""
