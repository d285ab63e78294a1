"""How the decoder's parameters lie in an HF folder: names, layouts, fused tensors."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from attnpo_jax.models.config import ModelConfig

# How a tensor of ours (without the layer axis) becomes Hugging Face's: for each axis there, the
# axes of ours that it merges, in order. Linear weights are (out, in) there, (in, out) here.
Layout = tuple[tuple[int, ...], ...]

_SAME_VECTOR = ((0,),)
_SAME_MATRIX = ((0,), (1,))
_TRANSPOSED = ((1,), (0,))
_HEADS_OUT = ((1, 2), (0,))  # (D, N, H) -> (N * H, D)
_HEADS_IN = ((2,), (0, 1))  # (N, H, D) -> (D, N * H)
_HEADS_VECTOR = ((0, 1),)  # (N, H) -> (N * H,)

# A model's text part may lie below one of these; the first is the one for text-only models.
TEXT_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
# Where it lies in folders of a model without its head (transformers' AutoModel), whose names lack
# the leading "model.".
_HEADLESS_PREFIXES = ("", "language_model.")

# What some folders hold beside parameters, by the end of the name: tables that a model computes
# anyway, and causal masks. None is the end of a parameter's name.
_BUFFER = re.compile(
    r"(^|\.)(\w*inv_freq|cos_cached|sin_cached|masked_bias|\w*attn\.bias|causal_mask|position_ids"
    r"|embed_scale)$"
)

# Parts of models that also see images: neither read nor trained, but carried into an export.
_CARRIED_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)

_LINEAR = {
    "query": ("self_attn.q_proj", _HEADS_OUT, _HEADS_VECTOR),
    "key": ("self_attn.k_proj", _HEADS_OUT, _HEADS_VECTOR),
    "value": ("self_attn.v_proj", _HEADS_OUT, _HEADS_VECTOR),
    "output": ("self_attn.o_proj", _HEADS_IN, _SAME_VECTOR),
    "gate": ("mlp.gate_proj", _TRANSPOSED, _SAME_VECTOR),
    "up": ("mlp.up_proj", _TRANSPOSED, _SAME_VECTOR),
    "down": ("mlp.down_proj", _TRANSPOSED, _SAME_VECTOR),
}
# Projections that share one tensor, one after the other along its first axis.
_FUSED = {
    "phi3": {
        "query": "self_attn.qkv_proj",
        "key": "self_attn.qkv_proj",
        "value": "self_attn.qkv_proj",
        "gate": "mlp.gate_up_proj",
        "up": "mlp.gate_up_proj",
    }
}


_T = TypeVar("_T")


class Slot(NamedTuple):
    """Where a parameter lies: the tensor's name, with `{layer}` for stacked ones, and its layout.

    Parameters with the same name are parts of one tensor, in the order of the table.
    """

    name: str
    layout: Layout


class Part(NamedTuple):
    """One layer of a parameter as Hugging Face has it, within the tensor that holds it."""

    name: str  # of the tensor
    path: str  # of the parameter
    layer: int | None  # None for a parameter that is not stacked
    shape: tuple[int, ...]  # of this part, in Hugging Face's layout
    start: int  # where along the tensor's first axis it begins


def text_prefix(names: Mapping[str, Any]) -> str:
    """What the names of a model's text part begin with, told by where its last norm lies."""
    for prefix in TEXT_PREFIXES:
        if f"{prefix}norm.weight" in names:
            return prefix
    return TEXT_PREFIXES[0]


def by_full_name(config: ModelConfig, tensors: Mapping[str, _T]) -> dict[str, _T]:
    """A folder's tensors, buffers left out, under the names that a model with a head has for them.

    Those of a folder without head get the "model." in front that they lack. Where embedding and
    head are one and only the head is stored, it stands for the embedding.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not is_buffer(name)}
    if any(f"{prefix}norm.weight" in kept for prefix in _HEADLESS_PREFIXES):
        kept = {n if n == "lm_head.weight" else f"model.{n}": t for n, t in kept.items()}
    slots = table(config, text_prefix(kept))
    embedding, head = slots["embedding"].name, slots["lm_head"].name
    if config.tie_word_embeddings and embedding not in kept and head in kept:
        kept[embedding] = kept.pop(head)
    return kept


def is_buffer(name: str) -> bool:
    """Whether a tensor is none of a model's parameters, but a table that it computes anyway."""
    return _BUFFER.search(name) is not None


def is_carried(config: ModelConfig, name: str) -> bool:
    """Whether a tensor belongs to a part that only goes from folder to folder."""
    return config.model_type == "gemma3" and name.startswith(_CARRIED_PREFIXES)


def table(config: ModelConfig, prefix: str = TEXT_PREFIXES[0]) -> dict[str, Slot]:
    """Where each parameter of a model lies, by its path in the parameter tree.

    The table has entries for optional parameters too; which of them a model has follows from
    `decoder.abstract_params`.
    """
    head = "language_model.lm_head" if prefix == "language_model.model." else "lm_head"
    slots = {
        "embedding": Slot(f"{prefix}embed_tokens.weight", _SAME_MATRIX),
        "final_norm": Slot(f"{prefix}norm.weight", _SAME_VECTOR),
        "lm_head": Slot(f"{head}.weight", _SAME_MATRIX),
    }

    def add(parameter: str, name: str, layout: Layout) -> None:
        slots[f"layers/{parameter}"] = Slot(f"{prefix}layers.{{layer}}.{name}", layout)

    # Where both a block's input and its output have a norm, the name that is elsewhere the input
    # norm of the feed-forward block goes to the output norm of attention.
    before_mlp = "pre_feedforward" if config.post_norms else "post_attention"
    add("attention_norm", "input_layernorm.weight", _SAME_VECTOR)
    add("mlp_norm", f"{before_mlp}_layernorm.weight", _SAME_VECTOR)
    add("attention_post_norm", "post_attention_layernorm.weight", _SAME_VECTOR)
    add("mlp_post_norm", "post_feedforward_layernorm.weight", _SAME_VECTOR)
    qk_layout = _HEADS_VECTOR if config.qk_norm == "projection" else _SAME_VECTOR
    add("query_norm", "self_attn.q_norm.weight", qk_layout)
    add("key_norm", "self_attn.k_norm.weight", qk_layout)
    fused = _FUSED.get(config.model_type, {})
    for parameter, (name, layout, bias_layout) in _LINEAR.items():
        name = fused.get(parameter, name)
        add(parameter, f"{name}.weight", layout)
        add(f"{parameter}_bias", f"{name}.bias", bias_layout)
    return slots


def parts(slots: Mapping[str, Slot], shapes: Mapping[str, Any]) -> Iterator[Part]:
    """Every part of a model's tensors, grouped by parameter, in the order of `slots`.

    Args:
      shapes: what has a `shape`, by the parameter's path; decides which parameters there are.
    """
    ends: dict[str, int] = {}
    for path, (template, layout) in slots.items():
        if path not in shapes:
            continue
        shape = tuple(shapes[path].shape)
        stacked = path.startswith("layers/")
        inner = hf_shape(shape[1:] if stacked else shape, layout)
        for layer in range(shape[0]) if stacked else (None,):
            name = template.format(layer=layer)
            yield Part(name, path, layer, inner, ends.get(name, 0))
            ends[name] = ends.get(name, 0) + inner[0]


def whole_shapes(of_model: list[Part]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from all parts of a model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in of_model:
        # Parts come in order, so the last one ends where the tensor does.
        shapes[part.name] = (part.start + part.shape[0], *part.shape[1:])
    return shapes


def hf_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape in Hugging Face's layout of a tensor of ours, without layer axis."""
    return tuple(math.prod(shape[axis] for axis in group) for group in layout)


def to_hf(value: np.ndarray, layout: Layout) -> np.ndarray:
    """A tensor of ours, without layer axis, in Hugging Face's layout."""
    order = [axis for group in layout for axis in group]
    return np.ascontiguousarray(value.transpose(order).reshape(hf_shape(value.shape, layout)))


def read_part(tensor: Any, shape: tuple[int, ...], layout: Layout, bounds, start: int):
    """The part within `bounds` of a parameter, in our layout, from a tensor of Hugging Face's.

    A merged axis is sliced along the outermost of our axes in it: no more of a file is read.

    Args:
      tensor: what gives an array when indexed with slices.
      shape: of the whole parameter in our layout, without layer axis.
      bounds: start and stop for each axis of ours.
      start: where along the tensor's first axis the parameter begins.
    """
    cut, split, rest = [], [], []
    for group in layout:
        outer, *inner = group
        block = math.prod(shape[axis] for axis in inner)
        begin, end = bounds[outer]
        offset = 0 if cut else start
        cut.append(slice(offset + begin * block, offset + end * block))
        split += [end - begin, *(shape[axis] for axis in inner)]
        rest += [slice(None), *(slice(*bounds[axis]) for axis in inner)]
    order = [axis for group in layout for axis in group]
    return tensor[tuple(cut)].reshape(split)[tuple(rest)].transpose(np.argsort(order))
