"""A PEFT folder of LoRA adapters in: what they add to the tensors of the model beneath.

Only such that are a sum of two factors are read, whatever their ranks and scales: what else PEFT
can change about a model is refused, since it would not be the same model without.

Shapes: R rank.
"""

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attnpo_jax.models.io import hf_folder
from attnpo_jax.models.io.hf_folder import FLOAT_TYPES, FolderError, Stored
from attnpo_jax.models.io.tensors import TEXT_PREFIXES

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# With these, the model is another one than its weights plus products of two factors.
_REFUSED = (
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # that leave the model as it is
_SCALES = ("r", "lora_alpha", "alpha_pattern", "use_rslora")


@dataclasses.dataclass(frozen=True)
class _Factors:
    """What is added to a weight (outputs, inputs): scale times B A."""

    a: np.ndarray  # float32 (R, inputs)
    b: np.ndarray  # float32 (outputs, R)
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


class Adapter:
    """Adapters for one model. Make one with `load`.

    Attributes:
      folder: where they were read.
      digest: sha256 of their weights and of what scales them.
    """

    def __init__(self, folder: Path, digest: str, factors: Mapping[str, _Factors]):
        self.folder, self.digest = folder, digest
        self._factors = factors

    def check(self, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> None:
        """Raises FolderError unless each adapter belongs to a tensor of the model.

        Args:
          shapes: of the model's tensors, by name.
          prefix: of the names of the model's text part.
        """
        for module, factors in self._factors.items():
            shape = shapes.get(f"{prefix}{module}.weight", shapes.get(f"{module}.weight"))
            if shape != factors.shape:
                raise FolderError(
                    f"{self.folder}: the adapter of {module} is for a weight of shape "
                    f"{factors.shape}, the model has "
                    f"{'none of that name' if shape is None else f'one of shape {shape}'}; "
                    "accepted: adapters that were trained on this model"
                )

    def onto(self, name: str, tensor: Any) -> Any:
        """The tensor of that name with what the adapters add, which gives arrays for slices."""
        for prefix in ("", *TEXT_PREFIXES):
            module = name.removeprefix(prefix).removesuffix(".weight")
            if name.startswith(prefix) and module in self._factors:
                return _Changed(tensor, self._factors[module])
        return tensor


@dataclasses.dataclass(frozen=True)
class _Changed:
    """A stored matrix with the product of two factors added, in float32."""

    tensor: Any
    factors: _Factors

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = index
        added = self.factors.b[rows] @ self.factors.a[:, columns]
        return self.tensor[index].astype(np.float32) + np.float32(self.factors.scale) * added


def load(folder: str | os.PathLike, field: str) -> Adapter:
    """Reads a folder that PEFT has saved.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      field: the config's field that names it, for messages.

    Raises:
      FolderError: a file is missing or damaged, or the adapters are of a kind that is not read.
    """
    path = Path(folder).expanduser()
    file = path / WEIGHTS
    if not (path / CONFIG).is_file() or not file.is_file():
        pickled = path / "adapter_model.bin"
        why = f"; {pickled.name} is a pickle, which is never read" if pickled.is_file() else ""
        raise FolderError(
            f"{field} = {os.fspath(folder)!r}: accepted: a folder with {CONFIG} and {WEIGHTS}, as "
            f"PEFT saves it{why}"
        )
    hf_folder.check_links(path, (CONFIG, WEIGHTS))
    config = hf_folder.read_json(path / CONFIG)
    _check_config(path / CONFIG, config)
    factors = _factors(file, config)
    told = repr([(key, config.get(key)) for key in _SCALES]).encode()
    with file.open("rb") as content:
        weights = hashlib.file_digest(content, "sha256").digest()
    return Adapter(path, hashlib.sha256(weights + told).hexdigest(), factors)


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise FolderError(f"{file}: peft_type is {config.get('peft_type')!r}; accepted: 'LORA'")
    for key in _REFUSED:
        if config.get(key):
            raise FolderError(f"{file}: {key} is {config[key]!r}; accepted: none")
    if config.get("bias", "none") != "none":
        raise FolderError(f"{file}: bias is {config['bias']!r}; accepted: 'none'")
    init = config.get("init_lora_weights")
    if init not in _INITS:
        raise FolderError(
            f"{file}: init_lora_weights is {init!r}, which changes the model's own weights; "
            f"accepted: {', '.join(map(repr, _INITS[1:]))}"
        )


def _factors(file: Path, config: Mapping[str, Any]) -> dict[str, _Factors]:
    found: dict[str, dict[str, Stored]] = {}
    for name, stored in hf_folder.stored_tensors([file]).items():
        match = _FACTOR.fullmatch(name)
        if match is None or len(stored.shape) != 2 or stored.dtype not in FLOAT_TYPES:
            raise FolderError(
                f"{file}: {name} is {stored.dtype} of shape {stored.shape}; accepted: matrices "
                "base_model.model.<module>.lora_A.weight and lora_B.weight of a floating dtype"
            )
        found.setdefault(match[1], {})[match[2]] = stored
    if not found:
        raise FolderError(f"{file}: no adapters")
    factors = {}
    with hf_folder.open_file(file) as opened:
        for module, both in found.items():
            if both.keys() != {"A", "B"} or both["A"].shape[0] != both["B"].shape[1]:
                shapes = {f"lora_{key}": stored.shape for key, stored in sorted(both.items())}
                raise FolderError(f"{file}: {module} has {shapes}; accepted: two factors of a rank")
            a, b = (opened.get_tensor(both[key].name).astype(np.float32) for key in "AB")
            name = _without_prefix(module)
            factors[name] = _Factors(a, b, _scale(file, config, module, len(a)))
    return factors


def _without_prefix(module: str) -> str:
    """A module's name without what a model's text part has in front."""
    for prefix in sorted(TEXT_PREFIXES, key=len, reverse=True):
        if module.startswith(prefix):
            return module.removeprefix(prefix)
    return module


def _scale(file: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha over the rank, or over its root, with the module's own alpha where it has one."""
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise FolderError(f"{file}: alpha_pattern is {patterns!r}; accepted: names with numbers")
    named = [key for key in patterns if _is_named(module, key, file)]
    alpha = patterns[named[0]] if named else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise FolderError(f"{file}: lora_alpha is {alpha!r}; accepted: a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _is_named(module: str, key: str, file: Path) -> bool:
    if not re.fullmatch(r"[\w.^]+", key):
        raise FolderError(f"{file}: alpha_pattern has {key!r}; accepted: names of modules")
    if key.startswith("^"):
        return module == key[1:]
    return module == key or module.endswith(f".{key}")
