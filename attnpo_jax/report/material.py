"""What a workdir holds for a page, read as far as it can be."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnpo_jax.data import column_sets
from attnpo_jax.data.manifest import METADATA, groups, read
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.shards import GROUPS
from attnpo_jax.evaluate import files
from attnpo_jax.evaluate.files import Evaluation
from attnpo_jax.parallel import checkpoint
from attnpo_jax.report.shown import TokenTexts
from attnpo_jax.runtime import history, metrics
from attnpo_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

# What a page is made of, beside the newest checkpoint's step.
_SOURCES = (
    "config.json",
    metrics.FILE,
    history.FILE,
    "prepared/**/prepared.json",
    f"{files.FOLDER}/**/*.json*",
    "samples/*.jsonl",
    "probe/**/*.json*",
)


def resolved(source: "Run | str | os.PathLike", *, run_plugins: bool = False) -> "Run":
    """A run, or that of a workdir; raises as `Run.of_workdir` does."""
    # By the package's door: this room is below that of Run, which ends with it.
    from attnpo_jax import Run

    return source if isinstance(source, Run) else Run.of_workdir(source, run_plugins=run_plugins)


@dataclasses.dataclass
class Material:
    """A workdir's content.

    Attributes:
      run: the run.
      lines: of `metrics.jsonl`.
      entries: what its stages did.
      evaluations: all that are finished.
      splits: the prepared pairs, held-out ones first.
      notes: what could not be read, and why.
    """

    run: "Run"
    lines: Sequence[Mapping[str, Any]] = ()
    entries: Sequence[history.Entry] = ()
    evaluations: Sequence[Evaluation] = ()
    splits: dict[str, Prepared] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, run: "Run") -> "Material":
        """Reads all but the samples."""
        found = cls(run)
        with found.noting():
            found.lines = metrics.read(run.workdir)
        with found.noting():
            found.entries = history.read(run.workdir)
        with found.noting():
            found.evaluations = files.of_workdir(run.workdir)
        for split in reversed(run.splits):
            with found.noting():
                found.splits[split] = open_all(run, split)
        return found

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Notes why the block could not read what it wanted to."""
        try:
            yield
        except (UserError, OSError) as error:
            self.notes.append(str(error))

    @property
    def step(self) -> int | None:
        """The last step that is logged."""
        return max((line["step"] for line in self.lines if "loss" in line), default=None)

    def token_texts(self) -> TokenTexts:
        """What tokens say; their ids, where the tokenizer can't be had."""
        with self.noting():
            return TokenTexts(self.run.tokenizer.tokenizer.backend_tokenizer)
        return TokenTexts(None)


def open_all(run: "Run", split: str) -> Prepared:
    """A split's pairs with all columns that were computed; raises as `Run.open_prepared` does.

    Where the model is not at hand by which they are told from others, with those of the dataset's
    own folder.
    """
    path = run.prepared_path(split)
    dataset = Prepared.open(path)
    sets = [read(file) for file in path.glob(f"{column_sets.FOLDER}/*/{METADATA}")]
    if not sets and not run.config.prepare.scorers:
        return dataset
    there = {*dataset.groups, *(name for one in sets for name in groups(one["components"]))}
    for reads in ([name for name in GROUPS if name in there and name != "scorer"], None):
        with contextlib.suppress(FileNotFoundError, UserError):
            return run.open_prepared(split, reads)
    return dataset


def digest(runs: Sequence["Run"], options: Sequence[Any]) -> str:
    """A sha256 (hex) of all that a page of these runs shows, and of how it is asked for."""
    whole = hashlib.sha256(repr(tuple(options)).encode())
    for run in runs:
        steps: list[int] = []
        with contextlib.suppress(UserError, OSError):
            steps = checkpoint.saved_steps(run.checkpoint_folder)
        whole.update(f"{run.workdir}\n{steps}\n".encode(errors="surrogatepass"))
        for file in sorted({f for pattern in _SOURCES for f in run.workdir.glob(pattern)}):
            if file.is_file():
                whole.update(os.fsencode(file.relative_to(run.workdir)) + b"\0")
                whole.update(_file_digest(file))
    return whole.hexdigest()


def _file_digest(file: pathlib.Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
