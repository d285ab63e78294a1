"""What a prepared dataset depends on, and whether the one on disk is the one a config means."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax.config import judge_layers
from attnpo_jax.data import mixture
from attnpo_jax.data.prepared import Prepared, PreparedMismatch, differences
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge.prompt import JudgeTemplate
from attnpo_jax.models.io import hf_folder as checkpoints


def read_chat_template(config: config_dict.ConfigDict) -> str | None:
    """The text of the file `model.chat_template` names, or None for the tokenizer's own."""
    if config.model.chat_template is None:
        return None
    return pathlib.Path(config.model.chat_template).read_text(encoding="utf-8")


def split_path(workdir: pathlib.Path, split: str) -> pathlib.Path:
    """The prepared dataset's folder; `split` is `train` or `eval`."""
    return pathlib.Path(workdir) / "prepared" / split


def components(
    config: config_dict.ConfigDict,
    split: str,
    folder: pathlib.Path,
    tokenizer: ChatTokenizer,
    pairs_digest: str | None,
    weight_columns: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that the rows of a prepared dataset depend on, as JSON.

    Args:
      config: the run's config.
      split: `train` or `eval`.
      folder: the model's folder.
      tokenizer: the tokenizer in use.
      pairs_digest: that of the split's pairs; None leaves it out.
      weight_columns: the names of the ready-made weights that they have.
    """
    model = checkpoints.load_config(folder)
    data: dict[str, Any] = {"sources": mixture.names(config.data[split])}
    if pairs_digest is not None:
        data["digest"] = pairs_digest
    ready = {}
    if weight_columns:
        ready["weight_columns"] = list(weight_columns)
        if config.data.weights_tokenizer is not None:
            ready["weights_tokenizer"] = config.data.weights_tokenizer
    source_layers = judge_layers(config, model.num_layers, model.layer_windows)
    return {
        "model": {
            "weights": checkpoints.weights_digest(folder),
            "config": model.facts(),
            "dtype": config.model.dtype,
            "param_dtype": config.model.param_dtype,
            "prepare_weights": config.model.prepare_weights,
        },
        "tokenizer": tokenizer.digest(),
        # Without a judge, nothing depends on how it would be asked.
        "judge": {
            "template": JudgeTemplate.load(config.judge.template).digest(),
            "max_length": config.judge.max_length,
            "max_answer_length": config.judge.max_answer_length,
            "verdict": config.judge.verdict,
        }
        if source_layers
        else None,
        "data": data,
        "max_length": config.data.max_length,
        "max_prompt_length": config.data.max_prompt_length,
        "source_layers": list(source_layers),
        "num_layers": model.num_layers,
        **ready,
    }


# By component, the config's field that decides it, where that has another name.
_FIELDS = {
    "model.weights": "model.source (its weights)",
    "num_layers": "model.source (its num_layers)",
    "tokenizer": "model.source or model.chat_template (the tokenizer)",
    "judge.template": "judge.template (its text)",
    "source_layers": "judge.layers",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
}


@contextlib.contextmanager
def naming_fields(split: str) -> Iterator[None]:
    """Lets a `PreparedMismatch` from inside speak of the config's fields."""

    def named(component: str) -> str:
        of_data = {"data.sources": f"data.{split}", "data.digest": f"data.{split} (its pairs)"}
        if component.startswith("model.config."):
            return f"model.source (its {component.removeprefix('model.config.')})"
        return of_data.get(component) or _FIELDS.get(component, component)

    try:
        yield
    except PreparedMismatch as error:
        raise PreparedMismatch(error.path, error.differences, named) from None


def open_prepared(config: config_dict.ConfigDict, workdir: pathlib.Path, split: str) -> Prepared:
    """Opens a split's prepared dataset, if it is what the config would prepare.

    The pairs themselves are not read again: of the data, only the names of its sources are checked.

    Args:
      config: the run's config.
      workdir: the run's folder.
      split: `train` or `eval`.

    Raises:
      FileNotFoundError: there is none, or it is not finished.
      PreparedMismatch: it was prepared with other settings.
      ConfigError: it lacks the ready-made weights that `weighting.column` names.
      DamagedShard: a shard is not what was written.
    """
    path = split_path(workdir, split)
    dataset = Prepared.open(path)
    folder = checkpoints.resolve(config.model.source)
    tokenizer = ChatTokenizer.load(folder, read_chat_template(config))
    columns = config_lib.weight_columns(config)
    if columns == "all":
        columns = dataset.weight_columns
    wanted = components(config, split, folder, tokenizer, None, columns)
    on_disk = dict(dataset.meta["components"])
    on_disk["data"] = {"sources": on_disk["data"]["sources"]}
    found = differences(on_disk, wanted)
    if found:
        with naming_fields(split):
            raise PreparedMismatch(path, found)
    config_lib.check_columns(config, dataset.weight_columns)
    return dataset
