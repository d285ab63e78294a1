import sys

from attnpo_jax.cli import main

sys.exit(main())
