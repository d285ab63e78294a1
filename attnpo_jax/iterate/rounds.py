"""A round: its folder, its config, what it was begun with, and what came of it."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax.generate import model as models
from attnpo_jax.iterate.labeler import Group
from attnpo_jax.iterate.pairing import row_of
from attnpo_jax.parallel import processes
from attnpo_jax.run import Run
from attnpo_jax.runtime import atomic, json_files, nested, schema
from attnpo_jax.runtime.errors import UserError

ROUNDS = "rounds"
BEGUN, DONE = "begun.json", "round.json"
PAIRS, LABELS = "pairs.jsonl", "labels"
_BEGUN = schema.Table({"settings": schema.Mapped(schema.Anything())})
_FIGURE = schema.Maybe(schema.Number())
_EVALUATED = schema.Mapped(schema.Mapped(schema.Row((_FIGURE, _FIGURE, _FIGURE))))
_DONE = schema.Table(
    {
        "settings": schema.Mapped(schema.Anything()),
        "figures": schema.Mapped(_FIGURE),
        "without a pair": schema.Mapped(schema.Whole()),
        "evaluations": _EVALUATED,
        "evaluations before": _EVALUATED,
    }
)
# What a round may have had otherwise, and still be the same but for rounding.
_INDIFFERENT = (
    "evaluate.",
    "iterate.checkpoints",
    "iterate.rounds",
    "log.",
    "parallel.",
    "plugins",
    "prepare.devices",
    "prepare.rows_per_shard",
    "serve.",
    "train.checkpoint_dir",
    "train.eval_batch_size",
    "train.evaluations.",
    "train.keep_checkpoints",
    "train.log_every",
    "train.microbatch_size",
    "train.samples.",
    "train.save_every",
    *(f"data.{name}" for name in ("num_buckets", "max_example_bytes")),
    *(f"generate.{name}" for name in ("samples", "slots")),
    *(f"judge.{name}" for name in ("batch_size", "num_buckets", "token_budget")),
    *(f"model.{name}" for name in ("attention", "logps_chunk", "remat")),
)


class RoundMismatch(UserError):
    """A round was begun with other settings."""


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """One round.

    Attributes:
      base: the run of all rounds.
      number: from 1.
      source: the model that it starts from, as `model.source` has it.
    """

    base: Run
    number: int
    source: str

    @property
    def folder(self) -> pathlib.Path:
        """Its workdir."""
        return folder_of(self.base, self.number)

    @property
    def pairs(self) -> pathlib.Path:
        """The file of its pairs."""
        return self.folder.resolve() / PAIRS

    @property
    def model(self) -> str:
        """Which of its models is its result: the best by `train.keep_best`, else the newest."""
        best = self.base.config.train.keep_best
        return f"{models.TRAINED}@best" if best else models.TRAINED

    def run(self) -> Run:
        """An ordinary run on its pairs; raises as `Run.resolve` does."""
        config = copy_of(self.base.config)
        config.model.source = self.source
        config.data.train = str(self.pairs)
        if config.lora.export == "adapter":
            config.lora.export = "both"  # the next round starts from the model
        if config.iterate.labeler == "judge":
            config.judge.verdict = True
        if config.train.checkpoint_dir:
            config.train.checkpoint_dir += f"/round-{self.number}"
        first = self.base.config.model.source
        if self.number > 1:
            _meet_the_first(config, first)
        if self.number > 1 and config.iterate.reference == "first":
            config.reference.source = config.reference.source or first
        return Run.resolve(config, self.folder)

    def settings(self, run: Run) -> dict[str, Any]:
        """What decides what comes of it, by field, as JSON has it."""
        fields = {
            field: value
            for field, value in config_lib.flatten(self.base.config).items()
            if not field.startswith(_INDIFFERENT) and field != "model.source"
        }
        if fields["iterate.labeler"] == "endpoint":
            fields["evaluate.judge.model"] = self.base.config.evaluate.judge.model
        if file := fields["iterate.verifier.file"]:
            path = pathlib.Path(file).expanduser()
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                fields["sha256 of iterate.verifier.file"] = digest
        fields["sha256 of the model that the round starts from"] = run.weights_digest
        return json.loads(json.dumps(fields))

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Writes down what it is begun with, or checks that it was begun so.

        Raises:
          RoundMismatch: it was begun otherwise.
        """
        if processes.is_first():
            file = self.folder / BEGUN
            self.folder.mkdir(parents=True, exist_ok=True)
            if file.exists():
                kept = json_files.read(file, _BEGUN, f"remove the folder {self.folder}")
                self._check(kept["settings"], settings)
            else:
                atomic.write_json(file, {"settings": dict(settings)})
        processes.barrier("iterate: a round is begun")

    def result(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What came of it, if it is finished; the same in all processes.

        Raises:
          RoundMismatch: it was begun otherwise than `settings` say.
        """
        file, found = self.folder / DONE, None
        if processes.is_first() and file.exists():
            found = json_files.read(file, _DONE, "delete it, and the round is finished again")
            self._check(found["settings"], settings)
        return processes.exchange(found, schema.Maybe(_DONE))[0]

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if changed := nested.differences(before, now):
            field, (was, wanted) = next(iter(changed.items()))
            raise RoundMismatch(
                f"{self.folder} was begun with {field} = {was!r}, now {wanted!r}; accepted: the "
                f"same, another workdir, or remove rounds/{self.number} and those after it"
            )

    def finish(self, settings: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Writes down what came of it, as the first process has it, and returns that."""
        content = processes.exchange({"settings": dict(settings), **result}, _DONE)[0]
        if processes.is_first():
            atomic.write_json(self.folder / DONE, content)
        processes.barrier("iterate: a round is finished")
        return content


def folder_of(base: Run, number: int) -> pathlib.Path:
    """The workdir of a round."""
    return base.workdir / ROUNDS / str(number)


def copy_of(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    """A config of its own, in which fields still take values of all their types."""
    return config_lib.from_json(config_lib.to_json(config))


def _meet_the_first(config: config_dict.ConfigDict, first: str) -> None:
    """Has evaluations hold each round's model against the first one, by the same judge."""
    versus = config.evaluate.versus
    if not versus.judge and not config.evaluate.judge.base_url:
        versus.judge = models.BASE
    for field in ("baseline", "judge"):
        if versus[field] == models.BASE:
            versus[field] = first


def write_pairs(
    file: str | pathlib.Path,
    places: Iterable[tuple[Group, int, int]],
    config: config_dict.ConfigDict,
) -> None:
    """Writes pairs of answers as a source that the config's `data` can read.

    Args:
      places: of each pair, its prompt, and which answers are chosen and rejected.
    """
    file = pathlib.Path(file)
    if processes.is_first():
        fields = dict(config.data.fields.items())
        atomic.write_json_lines(file, (row_of(group, i, j, fields) for group, i, j in places))
    processes.barrier("iterate: pairs are written")
    processes.wait_until_seen(file)
