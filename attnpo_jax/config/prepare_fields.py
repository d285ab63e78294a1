"""The fields of the section `prepare`: what is computed of the pairs, and where."""

from collections.abc import Mapping

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field

FIELDS: dict[str, Field] = {
    "prepare.rows_per_shard": Field(
        256,
        rules.integer(1, 10_000_000),
        "pairs in one file of the prepared dataset; an interruption loses less than that",
    ),
    "prepare.devices": Field(
        "auto",
        rules.one_of("auto", "process", "all"),
        "of several processes: each prepares shards of its own on its own devices, or all "
        "prepare the same shards together on the mesh that training has. The first waits "
        "for nobody; the second is for a model that one process's devices can't hold. "
        "'auto': the first, unless the parameters would take more than half of these "
        "devices' memory (as GPUs and TPUs tell it) and all devices together would share "
        "them further",
    ),
    "prepare.scorers": Field(
        {},
        rules.Rule(lambda v: isinstance(v, Mapping), "a dict of scorers by name, each a dict"),
        "what else gives each token a number, by name: another model's log-probs, as `{'pos': "
        "{'model': 'owner/name'}}`, or a function of both responses' tokens, as `{'new': "
        "{'function': 'diff'}}` ([data.md](data.md#scorers)); on the command line "
        "`--config.prepare.scorers.pos.model=owner/name`. Weightings read them as columns",
        mixed=True,
    ),
}
