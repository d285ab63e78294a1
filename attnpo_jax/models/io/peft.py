"""Adapters as a folder that PEFT loads: adapter_config.json and adapter_model.safetensors.

PEFT has the factors of a linear module as `lora_A.weight` (R, inputs) and `lora_B.weight` (outputs,
R). Where several of our projections are one module there (Phi-3), their adapters become one of the
sum of their ranks: the A's stand below each other, the B's on a block diagonal, and the same scale
needs as many times alpha.

Shapes: as in `models.lora`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.decoder import abstract_params
from attnpo_jax.models.io import hf_save
from attnpo_jax.models.io.tensors import TEXT_PREFIXES, hf_shape, table

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


class _Projection(NamedTuple):
    """One of our projections in a module of theirs: its name, and how many outputs it has there."""

    name: str
    outputs: int


def _modules(model: ModelConfig) -> dict[str, list[_Projection]]:
    """By a module's name with `{layer}`, the projections in it; modules without adapter left out.

    The name is what transformers calls the module, which need not be what files call it.
    """
    prefix = "model.language_model." if model.model_type == "gemma3" else TEXT_PREFIXES[0]
    shapes = abstract_params(model)["layers"]
    modules: dict[str, list[_Projection]] = {}
    for path, slot in table(model, prefix).items():
        name = path.removeprefix("layers/")
        # A projection's weight is a matrix there; norms and biases are not.
        if path.startswith("layers/") and name in shapes and len(slot.layout) == 2:
            outputs = hf_shape(shapes[name].shape[1:], slot.layout)[0]
            module = slot.name.removesuffix(".weight")
            modules.setdefault(module, []).append(_Projection(name, outputs))
    targets = set(model.lora.targets)
    return {m: held for m, held in modules.items() if targets & {p.name for p in held}}


def _factors(
    held: list[_Projection], layers: Mapping[str, np.ndarray], layer: int
) -> tuple[np.ndarray, np.ndarray]:
    """A (R', inputs) and B (outputs, R') of a module in one layer."""
    pairs, start = [], 0
    for projection in held:
        if f"{projection.name}_lora_a" in layers:
            a, b = (np.asarray(layers[f"{projection.name}_lora_{f}"][layer]) for f in "ab")
            rank = b.shape[0]
            pairs.append((a.reshape(-1, rank).T, b.reshape(rank, -1).T, start))
        start += projection.outputs
    A = np.concatenate([a for a, _, _ in pairs])
    B, column = np.zeros((start, len(A)), np.float32), 0
    for _, b, row in pairs:
        B[row : row + b.shape[0], column : column + b.shape[1]] = b
        column += b.shape[1]
    return np.ascontiguousarray(A), B


def _config(
    model: ModelConfig, modules: Mapping[str, list[_Projection]], base: str
) -> dict[str, Any]:
    lora = model.lora
    names = {module.rsplit(".", 1)[-1]: held for module, held in modules.items()}
    ranks, alphas = {}, {}
    for name, held in names.items():
        adapted = len([p for p in held if p.name in lora.targets])
        if adapted > 1:
            ranks[name], alphas[name] = adapted * lora.rank, adapted * lora.alpha
    targets: list[str] | str = list(names)
    if model.model_type == "gemma3":
        # By name alone, the vision tower's projections would be meant too.
        targets = rf".*\blanguage_model\b.*\.({'|'.join(names)})"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def save_adapter(
    folder: str | os.PathLike,
    model: ModelConfig,
    adapters: Mapping[str, Any],
    *,
    base: str,
    source_folder: str | os.PathLike,
    chat_template: str | None = None,
    origin: Any = None,
) -> None:
    """Exports adapters as a folder for PEFT, in float32, with the tokenizer's files.

    Everything goes to a folder beside the target first, so the target is whole or absent.

    Args:
      folder: where to write; may exist if it is empty or an earlier export.
      base: what the adapters belong to, a hub id or a folder; PEFT loads it by that name.
      chat_template: Jinja text that takes the place of the tokenizer's own template.
      origin: what the adapters are, as JSON values; see `hf_save.read_origin`.

    Raises:
      OSError: the place can't be written; what was at `folder` stays.
    """
    modules, tensors = _modules(model), {}
    for module, held in modules.items():
        for layer in range(model.num_layers):
            name = f"base_model.model.{module.format(layer=layer)}"
            A, B = _factors(held, adapters["layers"], layer)
            tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    with hf_save.replacing(folder, overwrite=False, origin=origin) as temporary:
        hf_save.copy_companions(Path(source_folder), temporary, chat_template)
        hf_save.write_json(temporary / _CONFIG, _config(model, modules, base))
        safetensors.numpy.save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
