"""What decides an evaluation's figures: fields of the config, and digests of what they name."""

import glob
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attnpo_jax import config as config_lib
from attnpo_jax.data import mixture
from attnpo_jax.evaluate.evaluator import Evaluator
from attnpo_jax.evaluate.task import Subject, digest_of, resolved
from attnpo_jax.runtime import nested

if TYPE_CHECKING:
    from attnpo_jax.run import Run

# These change figures by rounding at most; or are of training, which the model's digest covers.
_NEUTRAL = {
    "data.num_buckets",
    "data.shuffle",
    "data.train",
    "generate.slots",
    "judge.batch_size",
    "judge.num_buckets",
    "judge.token_budget",
    "model.logps_chunk",
    "model.remat",
}
MODELS = "sha256 of models"
_JUDGE = "evaluate.judge.model"
# Beside an evaluation's own, the fields that name files.
_NAME_FILES = ("data.eval", "judge.template", "model.chat_template")
# Of a folder's files, those that hold data, tasks, or a model's settings; not its weights.
_ENDINGS = {
    *(".arrow", ".csv", ".gz", ".json", ".jsonl", ".parquet", ".tsv"),
    *(".py", ".txt", ".yaml", ".yml"),
}


def settings_of(run: "Run", evaluator: Evaluator, subject: Subject | None) -> dict[str, Any]:
    """By field, JSON values; `sha256 of FIELD` for what a field names, `sha256 of models` for the
    models that take part by what they are called, see `task.resolved`.
    """
    own = f"evaluate.{evaluator.section}."
    settings: dict[str, Any] = {"version": evaluator.version}
    for field, value in config_lib.flatten(run.config).items():
        is_own = field.startswith(own)
        is_read = field.startswith(evaluator.reads) and field not in _NEUTRAL
        if field == _JUDGE and is_read:
            settings[field] = value if run.config.evaluate.judge.base_url else ""
        elif is_own or (is_read and subject is not None):
            settings[field] = value
            if is_own or field in _NAME_FILES:
                settings |= _digest(field, value)
    if subject is not None:
        digests = {subject.resolved: subject.digest}
        for which in evaluator.others(run.config):
            # While it is trained, there is no checkpoint of it yet.
            is_itself = which == subject.which
            if not is_itself and (name := resolved(run, which)) not in digests:
                digests[name] = digest_of(run, which)
        settings[MODELS] = digests
    return json.loads(json.dumps(settings))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two evaluations' settings differ, by field; a model by another name is the same one."""
    names = {digest: name for name, digest in now.get(MODELS, {}).items()}
    if MODELS in before:
        called = {names.get(digest, name): digest for name, digest in before[MODELS].items()}
        before = {**before, MODELS: called}
    return nested.differences(before, now)


def _digest(field: str, value: Any) -> dict[str, str]:
    """sha256 of the file that a field names, or of all of its files together; nothing if there are
    none here.
    """
    if field == "data.eval":
        named = [source for source, _ in mixture.parse(value)]
    else:
        named = [value] if isinstance(value, str) and value else []
    digests = []
    for path in (file for source in named for file in _files(source)):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) > 1:
        digests = [hashlib.sha256("".join(digests).encode()).hexdigest()]
    return {f"sha256 of {field}": one for one in digests}


def _files(source: str) -> Iterator[pathlib.Path]:
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        path = pathlib.Path(str(path).rpartition("@")[0] or path)  # FOLDER@SPLIT
    for found in [path] if path.exists() else sorted(map(pathlib.Path, glob.glob(str(path)))):
        if found.is_dir():
            inside = sorted(file for file in found.rglob("*") if file.suffix in _ENDINGS)
            yield from (file for file in inside if file.is_file())
        elif found.is_file():
            yield found
