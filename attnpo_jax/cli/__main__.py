"""`python -m attnpo_jax.cli`, as `attnpo`."""

import sys

from attnpo_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
