"""What processes that tests launch import, and what is arranged for them, before they are forked.

None of it may start a backend of JAX. Scripts of tests are not among it: those are run, and not
imported.
"""

import gc
import types

from jax._src import compiler
from transformers import AutoTokenizer  # noqa: F401
from transformers.models.llama import configuration_llama  # noqa: F401

import attnpo_jax.cli
import attnpo_jax.evaluate.compare
import attnpo_jax.export.stage
import attnpo_jax.generate.stage
import attnpo_jax.parallel.machine
import attnpo_jax.prepare.stage
import attnpo_jax.prepare.wanted
import attnpo_jax.run
import attnpo_jax.train.stage  # noqa: F401

# Of several processes, JAX has only the first one keep what it compiles, since some file systems
# can't take more. The programs of the others are not the same: they would compile at each launch.
compiler.distributed = types.SimpleNamespace(
    global_state=types.SimpleNamespace(process_id=0, client=None)
)

# What is here stays: forks need not look through it again and again, nor have memory of their own
# for it.
gc.collect()
gc.freeze()
