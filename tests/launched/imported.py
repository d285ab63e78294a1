"""What processes that tests launch import, and what is arranged for them, before they are forked.

None of it may start a backend of JAX. Scripts of tests are not among it: those are run, and not
imported.
"""

import gc
import importlib
import types

from jax._src import compiler

for module in (
    "attnpo_jax.cli",
    "attnpo_jax.evaluate.compare",
    "attnpo_jax.export.stage",
    "attnpo_jax.generate.stage",
    "attnpo_jax.parallel.machine",
    "attnpo_jax.prepare.stage",
    "attnpo_jax.prepare.wanted",
    "attnpo_jax.run",
    "attnpo_jax.train.stage",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
):
    importlib.import_module(module)

# Of several processes, JAX has only the first one keep what it compiles, since some file systems
# can't take more. The programs of the others are not the same: they would compile at each launch.
compiler.distributed = types.SimpleNamespace(
    global_state=types.SimpleNamespace(process_id=0, client=None)
)

# What is here stays: forks need not look through it again and again, nor have memory of their own
# for it.
gc.collect()
gc.freeze()
