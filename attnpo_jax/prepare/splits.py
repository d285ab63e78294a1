"""What `prepare` is to compute of a split: its dataset, and sets of columns beside it."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from attnpo_jax import config as config_lib
from attnpo_jax.data import column_sets, prepared
from attnpo_jax.data.cache_key import naming_fields
from attnpo_jax.data.shards import GROUPS
from attnpo_jax.data.sources import LoadedPairs, Pairs
from attnpo_jax.models.io.model_source import ModelSource
from attnpo_jax.parallel import processes
from attnpo_jax.runtime import schema

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LAYOUT = schema.Listed(schema.Listed(schema.Choice(tuple(GROUPS))))


@dataclasses.dataclass(frozen=True)
class Split:
    """A split's pairs, and where and as what they are prepared; or a set of columns of theirs.

    Attributes:
      name: `train` or `eval`.
      path: the folder.
      pairs, bad_rows: of the split.
      components: what the rows depend on, see `data.prepared`.
      status: what is there, see `data.prepared.status`.
      groups: what is computed of judge and reference, of `data.shards.GROUPS`.
      reference: whose the reference's columns are; None for the model that training starts from.
    """

    name: str
    path: pathlib.Path
    pairs: Pairs
    bad_rows: list[dict[str, Any]]
    components: dict[str, Any]
    status: str
    groups: tuple[str, ...]
    reference: ModelSource | None = None

    @property
    def is_set(self) -> bool:
        """Whether it is a set of columns beside the dataset."""
        return "of" in self.components

    @classmethod
    def parts(cls, run: "Run", name: str, loaded: LoadedPairs) -> list["Split"]:
        """A split's dataset, and the sets that hold what it lacks of what the run reads.

        Raises:
          PreparedMismatch: the dataset on disk was prepared with other settings.
          ConfigError: the data lack a column that the weighting reads.
        """
        config_lib.check_columns(run.config, loaded.weight_columns)
        wanted = run.cache_key(name, loaded.pairs.digest, loaded.weight_columns)
        of = run.prepared_path(name), wanted
        other = None if run.reference is None else run.reference.identity
        # The first process has made what there is, so what it sees counts for all.
        layout = processes.exchange(column_sets.layout(*of, run.reads, other), _LAYOUT)[0]
        found = []
        parts = column_sets.parts(*of, layout, other)
        for (path, components), groups in zip(parts, layout, strict=True):
            with naming_fields(name):
                status = prepared.status(path, components)
            part = name, path, loaded.pairs, loaded.bad_rows, components, status, tuple(groups)
            found.append(cls(*part, run.reference if "reference" in components else None))
        return found
