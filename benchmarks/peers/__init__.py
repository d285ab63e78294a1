"""What the package is compared with. Run by a Python that has torch, and needs nothing of ours."""
