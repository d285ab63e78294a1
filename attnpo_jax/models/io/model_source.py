"""A model other than the one that a run trains, by where it comes from."""

import dataclasses
import functools
import pathlib
from typing import Any

from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.io import adapter as adapters
from attnpo_jax.models.io import hf_folder


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model that a config names. It is looked up when it is first asked for, and kept.

    Attributes:
      source: as `model.source` of a config.
      field: the config's field that names it, for messages.
      weights: whether its weights are fetched.
      adapter: a PEFT folder of adapters on it, and the config's field that names that; None for
        none.
    """

    source: str
    field: str
    weights: bool = True
    adapter: tuple[str, str] | None = None

    @functools.cached_property
    def folder(self) -> pathlib.Path:
        """Its local Hugging Face folder."""
        return hf_folder.resolve(self.source, weights=self.weights, field=self.field)

    @functools.cached_property
    def shape(self) -> ModelConfig:
        """Its shape."""
        return hf_folder.load_config(self.folder)

    @functools.cached_property
    def read_adapter(self) -> adapters.Adapter | None:
        """The adapters, if there are any."""
        return None if self.adapter is None else adapters.load(*self.adapter)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What it is, as JSON: a digest of its weights, its shape, and a digest of adapters."""
        found = {"weights": hf_folder.weights_digest(self.folder), "config": self.shape.facts()}
        if self.read_adapter is not None:
            found["adapter"] = self.read_adapter.digest
        return found
