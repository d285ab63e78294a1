"""HF folders in: config.json, safetensors and the files beside them.

Weights are read as safetensors alone; pickled ones (*.bin, *.pt) are refused.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from attnpo_jax.models import int8
from attnpo_jax.models.decoder import ModelConfig, abstract_params
from attnpo_jax.models.io import embedded, hf_config
from attnpo_jax.models.io.tensors import (
    Part,
    Slot,
    by_full_name,
    is_buffer,
    is_carried,
    parts,
    read_part,
    table,
    text_prefix,
    whole_shapes,
)
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.paths import leaves, searched

if TYPE_CHECKING:
    from attnpo_jax.models.io.adapter import Adapter

_LOG = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOAT_TYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}
# Values of two tensors that are compared at a time.
_COMPARED = 1 << 24
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
# What tokenizers and processors consist of, in any of the forms that transformers reads; not
# whatever lies in a folder, which may be an adapter's config or a record of its training.
COMPANIONS = (
    "generation_config.json",
    "*token*.json",
    "*vocab*.json",
    "*vocab*.txt",
    "merges.txt",
    "bpe.codes",
    "normalizer.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "*processor_config.json",
    "chat_template.json",
    "*.jinja",
)


# Bytes of a JSON file that is read; the index of the largest models has some ten millions.
_LARGEST_JSON = 1 << 26
TEMPLATES = "additional_chat_templates"


class FolderError(UserError):
    """An HF folder can't be used; the message names the file or tensor and what is wrong."""


class Stored(NamedTuple):
    """Where a tensor lies on disk and what its file's header says of it."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str


# --- Finding and reading a folder ----------------------------------------------------------------


def resolve(
    source: str | os.PathLike, *, weights: bool = True, field: str = "model.source"
) -> Path:
    """The local folder of a model.

    Args:
      source: a local Hugging Face folder, the alias `smollm2-135m-instruct`, or a hub id
        `owner/name`, which is downloaded: safetensors, configuration and tokenizer alone.
      weights: whether the safetensors are wanted.
      field: the config's field that names it, for messages.
    """
    text = os.fspath(source)
    if text == embedded.ALIAS:
        return embedded.fetch()
    folder = Path(text).expanduser()
    if folder.is_dir():
        check_links(folder)
        return folder
    accepted = f"a local Hugging Face folder, {embedded.ALIAS!r}, or a hub id 'owner/name'"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        raise FolderError(
            f"{field} {text!r} is not a folder; accepted: {accepted}; {searched(folder)}"
        )
    wanted = ["config.json", INDEX, *(["*.safetensors"] if weights else []), *COMPANIONS]
    try:
        downloaded = huggingface_hub.snapshot_download(
            text,
            allow_patterns=wanted,
            # Folders inside a repository hold other formats of the same weights, or templates.
            ignore_patterns=[f"*/{pattern}" for pattern in wanted if pattern != "*.jinja"],
        )
    except Exception as error:
        raise FolderError(
            f"{field} {text!r} is not a local folder and could not be downloaded from the "
            f"hub: {error}. Accepted: {accepted}; {searched(folder)}"
        ) from error
    return Path(downloaded)


_READ = ("config.json", "*.safetensors", INDEX, *COMPANIONS, f"{TEMPLATES}/*.jinja")


def check_links(folder: Path, patterns: Iterable[str] = _READ) -> None:
    """Refuses a folder of which a file that is read or exported is a link out of it.

    Whoever made the folder could have other files of this machine read, and published in an export.

    Args:
      patterns: of the files' names.

    Raises:
      FolderError: it names the link and where it leads.
    """
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            if (target := leaves(file, folder)) is not None:
                raise FolderError(
                    f"{file} is a link out of its folder, to {target}; accepted: the file itself, "
                    "or a snapshot in the hub's cache"
                )


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a folder holds."""
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise FolderError(f"{path} has {size} bytes; accepted: up to {_LARGEST_JSON}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"{path} does not exist") from error
    except FolderError:
        raise
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, or of integers
        raise FolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise FolderError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def load_config(folder: str | os.PathLike) -> ModelConfig:
    """The model's shape from a folder's config.json, and from its weights if they are there.

    Of these, what decides is whether a model whose config.json ties embedding and head has a head
    of its own all the same: then the two are not tied, as in transformers 5.
    """
    path = Path(folder) / "config.json"
    content = read_json(path)
    try:
        config = hf_config.read(content)
    except (ValueError, OverflowError) as error:
        raise FolderError(f"{path}: {error}") from error
    if config.tie_word_embeddings and _has_own_head(Path(folder), config):
        _LOG.warning(
            "%s: config.json says tie_word_embeddings true, but the lm_head.weight that is stored "
            "differs from the embedding: both are used, untied, and an export says so (as "
            "transformers does; tie_word_embeddings false in config.json ends this warning)",
            folder,
        )
        return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def _has_own_head(folder: Path, config: ModelConfig) -> bool:
    """Whether a folder holds both an embedding and a head, and they are not the same."""
    try:
        stored = stored_tensors(weight_files(folder)[0])
    except FolderError:
        return False  # no weights, or none that can be read: told of when they are wanted
    stored = by_full_name(config, stored)
    slots = table(config, text_prefix(stored))
    both = [stored.get(slots[path].name) for path in ("embedding", "lm_head")]
    if None in both:
        return False
    embedding, head = both
    if embedding.shape != head.shape or len(head.shape) != 2 or 0 in head.shape:
        return True
    with open_file(embedding.file) as one, open_file(head.file) as other:
        slices = one.get_slice(embedding.name), other.get_slice(head.name)
        size, width = head.shape
        rows = max(1, _COMPARED // width)
        return not all(
            np.array_equal(*(tensor[start : min(start + rows, size)] for tensor in slices))
            for start in range(0, size, rows)
        )


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The folder's safetensors files, and the index's tensor -> file name map (empty if none)."""
    check_links(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    index = folder / INDEX
    if not index.is_file():
        pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        why = f"; {', '.join(pickled)} are pickles, which are never read" if pickled else ""
        raise FolderError(f"{folder} has neither {SINGLE} nor {INDEX}{why}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FolderError(f"{index} has no 'weight_map' from tensor names to files")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise FolderError(
                f"{index}: weight_map has {_short(name)} for {tensor}; accepted: the name of a "
                ".safetensors file in the same folder"
            )
    names = sorted(set(weight_map.values()))
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        raise FolderError(f"{index} names files that {folder} lacks: {', '.join(lost)}")
    return [folder / name for name in names], weight_map


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def open_file(file: Path):
    """A safetensors file, open for reading; a context manager."""
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, ValueError) as error:
        raise FolderError(f"{file} is damaged or cut short: {error}") from error


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """The tensors of these files by name."""
    stored = {}
    for file in files:
        with open_file(file) as opened:
            for name in opened.keys():
                if name in stored:
                    raise FolderError(f"{name} is in {stored[name].file.name} and in {file}")
                slice_ = opened.get_slice(name)
                stored[name] = Stored(file, name, tuple(slice_.get_shape()), slice_.get_dtype())
    return stored


# --- Loading -------------------------------------------------------------------------------------


def _check_stored(
    folder: Path,
    config: ModelConfig,
    slots: Mapping[str, Slot],
    wanted: list[Part],
    stored: Mapping[str, Stored],
    weight_map: Mapping[str, str],
) -> None:
    """Raises one error that names every missing, extra, misshapen and non-float tensor."""
    missing, misshapen, not_float = [], [], []
    shapes = whole_shapes(wanted)
    for name, shape in shapes.items():
        found = stored.get(name)
        if found is None:
            file = weight_map.get(name, INDEX if weight_map else SINGLE)
            missing.append(f"{name} (not in {file})")
        elif found.shape != shape:
            where = f"{found.name} in {found.file.name}"
            misshapen.append(f"{where}: found {found.shape}, expected {shape}")
        elif found.dtype not in FLOAT_TYPES:
            not_float.append(f"{found.name} in {found.file.name}: {found.dtype}")
    # A tied head is a copy of what the model has anyway: see `load_config`.
    known = {*shapes, slots["lm_head"].name}
    extra = [
        f"{found.name} in {found.file.name}"
        for name, found in stored.items()
        if name not in known and not is_carried(config, name)
    ]
    problems = []
    for what, names in (
        ("missing", missing),
        ("of another shape than config.json says", misshapen),
        ("unknown to this model type", extra),
        (f"of a type that is not among {', '.join(FLOAT_TYPES)}", not_float),
    ):
        if names:
            more = f"\n    and {len(names) - 20} more" if len(names) > 20 else ""
            listed = "".join(f"\n    {name}" for name in names[:20])
            problems.append(f"\n  {len(names)} {what}:{listed}{more}")
    if problems:
        raise FolderError(f"{folder}: the tensors do not fit config.json:{''.join(problems)}")


def _parameter_reader(
    leaf: jax.ShapeDtypeStruct,
    layout,
    layers: list[Part],
    stored: Mapping[str, Stored],
    adapter: "Adapter | None",
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function from an index (one slice an axis) to that part of a parameter, in its dtype."""
    stacked = layers[0].layer is not None
    shape = leaf.shape if stacked else (1, *leaf.shape)
    # Devices that hold copies of one stack ask for it one after the other.
    stacks: dict[tuple, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        full = index if stacked else (slice(None), *index)
        bounds = tuple(part.indices(size)[:2] for part, size in zip(full, shape, strict=True))
        if bounds in stacks:
            return stacks[bounds]
        # Converted while it is copied into place: no second copy of the stack is made.
        stack = np.empty([stop - start for start, stop in bounds], leaf.dtype)
        for row, part in enumerate(layers[slice(*bounds[0])]):
            # Opened anew for every part: pages of a file that stays mapped count as our memory.
            found = stored[part.name]
            with open_file(found.file) as opened:
                tensor = opened.get_slice(found.name)
                if adapter is not None:
                    tensor = adapter.onto(part.name, tensor)
                stack[row] = read_part(tensor, shape[1:], layout, bounds[1:], part.start)
        stacks[bounds] = stack if stacked else stack[0]
        return stacks[bounds]

    return read


def load_params(
    folder: str | os.PathLike,
    config: ModelConfig,
    *,
    param_dtype=jnp.float32,
    shardings: Mapping[str, Any] | None = None,
    adapter: "Adapter | None" = None,
) -> dict[str, Any]:
    """Reads a folder's weights into the decoder's parameter tree.

    One stacked parameter at a time is on the host; with `shardings`, only the parts that this
    process's devices hold are read, device by device.

    Args:
      config: the folder's config (see `load_config`), or `int8.quantized` of it.
      shardings: a tree like the parameters' of `jax.sharding.Sharding`, or None for the default
        device.
      adapter: what is added to the weights; the sums are rounded once, to `param_dtype` or int8.
    """
    folder = Path(folder)
    files, weight_map = weight_files(folder)
    as_stored = dataclasses.replace(config, int8=False)
    shapes = flatten_dict(abstract_params(as_stored, param_dtype), sep="/")
    stored = by_full_name(config, stored_tensors(files))
    slots = table(config, text_prefix(stored))
    wanted = list(parts(slots, shapes))
    _check_stored(folder, config, slots, wanted, stored, weight_map)
    if adapter is not None:
        adapter.check(whole_shapes(wanted), text_prefix(stored))
    flat_shardings = {} if shardings is None else flatten_dict(shardings, sep="/")

    params = {}
    for path, leaf in shapes.items():
        of_path = [part for part in wanted if part.path == path]
        read = _parameter_reader(leaf, slots[path].layout, of_path, stored, adapter)
        if shardings is None:
            params[path] = jax.device_put(read((slice(None),) * len(leaf.shape)))
        else:
            params[path] = jax.make_array_from_callback(
                leaf.shape, flat_shardings[path], read, dtype=leaf.dtype
            )
        # Transfers run in the background and would keep every host buffer until they end.
        params[path].block_until_ready()
        if config.int8 and int8.is_quantized(path):
            # At once: no more than one parameter is there in full.
            pair = path, path + int8.SCALE
            placed = None if shardings is None else tuple(flat_shardings[name] for name in pair)
            params |= dict(zip(pair, int8.quantize(path, params[path], placed), strict=True))
            params[path].block_until_ready()
    return unflatten_dict(params, sep="/")


def stored_dtype(folder: str | os.PathLike) -> np.dtype:
    """The narrowest dtype, of at most 32 bits, that holds all of a folder's weights unchanged."""
    stored = stored_tensors(weight_files(Path(folder))[0]).items()
    found = {
        FLOAT_TYPES[tensor.dtype]
        for name, tensor in stored
        if tensor.dtype in FLOAT_TYPES and not is_buffer(name)
    }
    if not found:
        raise FolderError(f"{folder}: no weights of a floating dtype; accepted: a model's folder")
    widest = functools.reduce(jnp.promote_types, found)
    return np.dtype(np.float32) if widest.itemsize > 4 else widest


def weights_digest(folder: str | os.PathLike) -> str:
    """A sha256 (hex) that tells a folder's weights from others without reading all of them.

    It covers, for each safetensors file in order of name: the name, the size, the header (tensor
    names, types, shapes, places), and 256 blocks of 4 KiB evenly spread from the first byte of the
    data to the last. Any training step changes nearly all values and so the digest; an edit of a
    few values in a large file can go unnoticed. The configuration is not covered.
    """
    digest = hashlib.sha256()
    for path in weight_files(Path(folder))[0]:
        with open_file(path):  # refuses a damaged header, or a size that does not fit it
            pass
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            header = file.read(int.from_bytes(prefix, "little"))
            digest.update(f"{path.name}\0{size}\0{len(header)}\0".encode())
            digest.update(header)
            first = file.tell()
            last = max(first, size - 4096)
            for offset in np.unique(np.linspace(first, last, 256, dtype=np.int64)):
                file.seek(int(offset))
                digest.update(file.read(4096))
    return digest.hexdigest()
