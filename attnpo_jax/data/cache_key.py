"""The cache key of a prepared dataset: everything that its rows depend on, as JSON."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from attnpo_jax.data import mixture
from attnpo_jax.data.columns import AS_THEY_ARE, Columns
from attnpo_jax.data.manifest import PreparedMismatch
from attnpo_jax.data.trained import TrainedForm

# By component, the config's field that decides it, where that has another name.
_FIELDS = {
    "model.weights": "model.source (its weights)",
    "num_layers": "model.source (its num_layers)",
    "tokenizer": "model.source, model.chat_template or model.chat_template_kwargs (the tokenizer)",
    "judge.template": "judge.template (its text)",
    "source_layers": "judge.layers",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    **{field.name: f"data.{field.name}" for field in dataclasses.fields(TrainedForm)},
}


def cache_key(
    *,
    model: Mapping[str, Any],
    tokenizer: str,
    judge: Mapping[str, Any],
    sources: Any,
    pairs_digest: str | None,
    columns: Columns = AS_THEY_ARE,
    lengths: Mapping[str, int],
    form: Mapping[str, Any] = MappingProxyType({}),
    source_layers: Sequence[int],
    num_layers: int,
    weight_columns: Sequence[str] = (),
    weights_tokenizer: str | None = None,
) -> dict[str, Any]:
    """The components of a split's cache key.

    Args:
      model: digest of the weights, shape, and the dtypes and weights of the passes.
      judge: the template's digest, and how it is asked; counts only where layers are kept.
      sources: the split's sources, as `data.train` has them.
      pairs_digest: that of the split's pairs; None leaves it out.
      columns: how their examples were read; counts where it is not the usual way.
      lengths: `max_length` and `max_prompt_length` of what is trained on.
      form: what else of that is not as by default, see `data.trained`.
      weights_tokenizer: whose tokens those weights stand for; None: the model's.
    """
    data: dict[str, Any] = {"sources": mixture.names(sources)}
    if pairs_digest is not None:
        data["digest"] = pairs_digest
    if columns.names:
        data["fields"] = dict(columns.names)
    if columns.ranked != AS_THEY_ARE.ranked:
        data["ranked"] = columns.ranked
    precomputed: dict[str, Any] = {}
    if weight_columns:
        precomputed["weight_columns"] = list(weight_columns)
        if weights_tokenizer is not None:
            precomputed["weights_tokenizer"] = weights_tokenizer
    return {
        "model": dict(model),
        "tokenizer": tokenizer,
        # Without a judge, nothing depends on how it would be asked.
        "judge": dict(judge) if source_layers else None,
        "data": data,
        **lengths,
        **form,
        "source_layers": list(source_layers),
        "num_layers": num_layers,
        **precomputed,
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
