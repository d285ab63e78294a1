"""What a prepared dataset depends on, and whether the one on disk is the one a config means."""

import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import config_dict

from attnpo_jax.config import check_layers
from attnpo_jax.config_rules import as_tuple
from attnpo_jax.data.prepared import Prepared, PreparedMismatch, differences
from attnpo_jax.data.sources import Pair, pairs_digest
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge_prompt import JudgeTemplate
from attnpo_jax.models import checkpoints


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
    pairs: Sequence[Pair] | None,
) -> dict[str, Any]:
    """Everything that the rows of a prepared dataset depend on, as JSON.

    Args:
      config: the run's config.
      split: `train` or `eval`.
      folder: the model's folder.
      tokenizer: the tokenizer in use.
      pairs: the split's pairs; None leaves their digest out.
    """
    model = checkpoints.load_config(folder)
    data: dict[str, Any] = {"sources": list(as_tuple(config.data[split]))}
    if pairs is not None:
        data["digest"] = pairs_digest(pairs)
    return {
        "model": {
            "weights": checkpoints.weights_digest(folder),
            "config": model.facts(),
            "dtype": config.model.dtype,
            "param_dtype": config.model.param_dtype,
            "prepare_weights": config.model.prepare_weights,
        },
        "tokenizer": tokenizer.digest(),
        "judge": {
            "template": JudgeTemplate.load(config.judge.template).digest(),
            "max_length": config.judge.max_length,
            "max_answer_length": config.judge.max_answer_length,
        },
        "data": data,
        "max_length": config.data.max_length,
        "max_prompt_length": config.data.max_prompt_length,
        "source_layers": list(check_layers(config, model.num_layers, model.layer_windows)),
        "num_layers": model.num_layers,
    }


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
      DamagedShard: a shard is not what was written.
    """
    path = split_path(workdir, split)
    dataset = Prepared.open(path)
    folder = checkpoints.resolve(config.model.source)
    tokenizer = ChatTokenizer.load(folder, read_chat_template(config))
    wanted = components(config, split, folder, tokenizer, pairs=None)
    on_disk = dict(dataset.meta["components"])
    on_disk["data"] = {"sources": on_disk["data"]["sources"]}
    found = differences(on_disk, wanted)
    if found:
        raise PreparedMismatch(path, found)
    return dataset
