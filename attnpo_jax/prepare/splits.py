"""What `prepare` is to compute of a split: its dataset, and sets of columns beside it."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from attnpo_jax import config as config_lib
from attnpo_jax.data import column_sets, prepared
from attnpo_jax.data.cache_key import naming_fields
from attnpo_jax.data.manifest import PreparedMismatch, groups
from attnpo_jax.data.sources import LoadedPairs, Pairs
from attnpo_jax.models.io.model_source import ModelSource
from attnpo_jax.parallel import processes
from attnpo_jax.prepare.readers import NamedScorer, Reader
from attnpo_jax.runtime import schema

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_PARTS = schema.Listed(schema.Row((schema.Text(), schema.Mapped(schema.Anything()))))


@dataclasses.dataclass(frozen=True)
class Split:
    """A split's pairs, and where and as what they are prepared; or a set of columns of theirs.

    Attributes:
      name: `train` or `eval`.
      path: the folder.
      pairs, bad_rows: of the split.
      components: what the rows depend on, see `data.prepared`.
      status: what is there, see `data.prepared.status`.
      dataset: the folder of the dataset, which a set is beside.
      model: whose pass it takes; None for the model that training starts from, or for no pass.
      judge: another judge, whose columns it has.
      scorer: whose columns it has.
    """

    name: str
    path: pathlib.Path
    pairs: Pairs
    bad_rows: list[dict[str, Any]]
    components: dict[str, Any]
    status: str
    dataset: pathlib.Path
    model: ModelSource | None = None
    judge: Reader | None = None
    scorer: NamedScorer | None = None

    @property
    def is_set(self) -> bool:
        """Whether it is a set of columns beside the dataset."""
        return "of" in self.components

    @property
    def groups(self) -> tuple[str, ...]:
        """What is computed, of `data.shards.GROUPS`."""
        return groups(self.components)

    @property
    def needs_model(self) -> bool:
        """Whether it takes a pass of a model."""
        return bool(self.groups) and (self.scorer is None or self.scorer.reader is not None)

    @property
    def title(self) -> str:
        """What it is called while it is computed."""
        return self.name if self.scorer is None else f"{self.name}, {self.scorer.scorer.name}"

    @property
    def has_judge_prompts(self) -> bool:
        """Whether a pair that the judge's prompt can't hold is none of its rows."""
        return self.components["judge"] is not None and (not self.is_set or "judge" in self.groups)

    @classmethod
    def parts(cls, run: "Run", name: str, loaded: LoadedPairs) -> list["Split"]:
        """A split's dataset, and the sets that hold what it lacks of what the run reads.

        Raises:
          PreparedMismatch: the dataset on disk was prepared with other settings.
          ConfigError: the data lack a column that the weighting reads.
        """
        config_lib.check_columns(run.config, (*run.scorers, *loaded.weight_columns))
        wanted = run.wanted(name, loaded.pairs.digest, loaded.weight_columns)
        path, found = run.prepared_path(name), []
        with naming_fields(name):
            parts = column_sets.parts(path, wanted)
            # The first process has made what there is, so what it sees counts for all.
            told = [[str(folder.relative_to(path)), of] for folder, of in parts]
            for folder, components in processes.exchange(told, _PARTS)[0]:
                status = prepared.status(path / folder, components)
                split = cls(
                    name,
                    path / folder,
                    loaded.pairs,
                    loaded.bad_rows,
                    components,
                    status,
                    path,
                    **_reader(run, components),
                )
                if not split.is_set and status == "partial":
                    # What is lacking can only be computed as the rest was.
                    if lacking := column_sets.keeps_from_repair(components, wanted):
                        raise PreparedMismatch(path, lacking)
                found.append(split)
        return found


def _reader(run: "Run", components: dict[str, Any]) -> dict[str, Any]:
    """Whose pass the columns of these components take."""
    if "scorer" in components:
        of = components["scorer"]
        scorer = next(scorer for scorer in run.scorers.values() if scorer.identity == of)
        return {"scorer": scorer, "model": scorer.reader and scorer.reader.model}
    if "model" in (components["judge"] or {}):
        return {"judge": run.judge, "model": run.judge.model}
    return {"model": run.reference} if "reference" in components else {}
