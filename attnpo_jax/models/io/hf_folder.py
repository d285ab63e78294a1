"""Hugging Face checkpoint folders in and out: config.json, safetensors and the files beside them.

Weights are read and written as safetensors alone; pickled checkpoints (*.bin, *.pt) are refused.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from attnpo_jax.models import int8
from attnpo_jax.models.decoder import ModelConfig, abstract_params
from attnpo_jax.models.io import embedded
from attnpo_jax.models.io.tensors import (
    Part,
    Slot,
    is_carried,
    parts,
    read_part,
    table,
    text_prefix,
    to_hf,
    whole_shapes,
)

__all__ = ["CheckpointError", "load_config", "load_params", "resolve", "save", "weights_digest"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOAT_TYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
# What tokenizers and processors consist of, in any of the forms that transformers reads; not
# whatever lies in a folder, which may be an adapter's config or a record of its training.
_COMPANIONS = (
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
_TEMPLATES = "additional_chat_templates"
_MARKER = "attnpo_export.json"
_SHARD_BYTES = 5 * 10**9


class CheckpointError(ValueError):
    """A checkpoint folder can't be used; the message names the file or tensor and what is wrong."""


class _Stored(NamedTuple):
    """Where a tensor lies on disk and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


# --- Finding and reading a folder ----------------------------------------------------------------


def resolve(source: str | os.PathLike, *, weights: bool = True) -> Path:
    """The local folder of a model.

    Args:
      source: a local Hugging Face folder, the alias `smollm2-135m-instruct`, or a hub id
        `owner/name`, which is downloaded: safetensors, configuration and tokenizer alone.
      weights: whether the safetensors are wanted.

    Raises:
      CheckpointError: it is none of these, or the hub can't deliver it.
      embedded.FetchError: the embedded model can't be fetched.
    """
    text = os.fspath(source)
    if text == embedded.ALIAS:
        return embedded.fetch()
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    accepted = f"a local Hugging Face folder, {embedded.ALIAS!r}, or a hub id 'owner/name'"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        raise CheckpointError(f"model.source {text!r} is not a folder; accepted: {accepted}")
    wanted = ["config.json", _INDEX, *(["*.safetensors"] if weights else []), *_COMPANIONS]
    try:
        downloaded = huggingface_hub.snapshot_download(
            text,
            allow_patterns=wanted,
            # Folders inside a repository hold other formats of the same weights, or templates.
            ignore_patterns=[f"*/{pattern}" for pattern in wanted if pattern != "*.jinja"],
        )
    except Exception as error:
        raise CheckpointError(
            f"model.source {text!r} is not a local folder and could not be downloaded from the "
            f"hub: {error}. Accepted: {accepted}"
        ) from error
    return Path(downloaded)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def load_config(folder: str | os.PathLike) -> ModelConfig:
    """The model's shape from a folder's config.json.

    Raises:
      CheckpointError: no config.json, or a model type or feature that is not supported.
    """
    path = Path(folder) / "config.json"
    content = _read_json(path)
    try:
        return ModelConfig.from_hf(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The folder's safetensors files, and the index's tensor -> file name map (empty if none)."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE], {}
    index = folder / _INDEX
    if not index.is_file():
        pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        why = f"; {', '.join(pickled)} are pickles, which are never read" if pickled else ""
        raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}{why}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to files")
    names = sorted(set(weight_map.values()))
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        raise CheckpointError(f"{index} names files that {folder} lacks: {', '.join(lost)}")
    return [folder / name for name in names], weight_map


def _open(file: Path):
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or cut short: {error}") from error


def _stored_tensors(files: list[Path]) -> dict[str, _Stored]:
    stored = {}
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():
                slice_ = opened.get_slice(name)
                stored[name] = _Stored(file, tuple(slice_.get_shape()), slice_.get_dtype())
    return stored


# --- Loading -------------------------------------------------------------------------------------


def _check_stored(
    folder: Path,
    config: ModelConfig,
    slots: Mapping[str, Slot],
    wanted: list[Part],
    stored: Mapping[str, _Stored],
    weight_map: Mapping[str, str],
) -> None:
    """Raises one error that names every missing, extra, misshapen and non-float tensor."""
    missing, misshapen, not_float = [], [], []
    shapes = whole_shapes(wanted)
    for name, shape in shapes.items():
        found = stored.get(name)
        if found is None:
            file = weight_map.get(name, _INDEX if weight_map else _SINGLE)
            missing.append(f"{name} (not in {file})")
        elif found.shape != shape:
            misshapen.append(f"{name} in {found.file.name}: found {found.shape}, expected {shape}")
        elif found.dtype not in _FLOAT_TYPES:
            not_float.append(f"{name} in {found.file.name}: {found.dtype}")
    # A tied head and the rotary table are copies of what the model has or computes anyway.
    known = {*shapes, slots["lm_head"].name}
    extra = [
        f"{name} in {found.file.name}"
        for name, found in stored.items()
        if name not in known
        and not name.endswith("rotary_emb.inv_freq")
        and not is_carried(config, name)
    ]
    problems = []
    for what, names in (
        ("missing", missing),
        ("of another shape than config.json says", misshapen),
        ("unknown to this model type", extra),
        (f"of a type that is not among {', '.join(_FLOAT_TYPES)}", not_float),
    ):
        if names:
            more = f"\n    and {len(names) - 20} more" if len(names) > 20 else ""
            listed = "".join(f"\n    {name}" for name in names[:20])
            problems.append(f"\n  {len(names)} {what}:{listed}{more}")
    if problems:
        raise CheckpointError(f"{folder}: the tensors do not fit config.json:{''.join(problems)}")


def _parameter_reader(
    leaf: jax.ShapeDtypeStruct,
    layout,
    layers: list[Part],
    stored: Mapping[str, _Stored],
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
            with _open(stored[part.name].file) as opened:
                tensor = opened.get_slice(part.name)
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
) -> dict[str, Any]:
    """Reads a folder's weights into the decoder's parameter tree.

    One stacked parameter at a time is on the host; with `shardings`, only the parts that this
    process's devices hold are read, device by device.

    Args:
      folder: a Hugging Face folder with model.safetensors or shards and their index.
      config: the folder's config (see `load_config`), or `int8.quantized` of it.
      param_dtype: the dtype of the parameters; the file's values are converted.
      shardings: a tree like the parameters' of `jax.sharding.Sharding`, or None for the default
        device.

    Returns:
      The nested dict of `jax.Array` that `abstract_params` describes.

    Raises:
      CheckpointError: no safetensors, a damaged file, or tensors that are missing, unknown,
        misshapen or not floating point; all of them are named.
    """
    folder = Path(folder)
    files, weight_map = _weight_files(folder)
    as_stored = dataclasses.replace(config, int8=False)
    shapes = flatten_dict(abstract_params(as_stored, param_dtype), sep="/")
    stored = _stored_tensors(files)
    slots = table(config, text_prefix(stored))
    wanted = list(parts(slots, shapes))
    _check_stored(folder, config, slots, wanted, stored, weight_map)
    flat_shardings = {} if shardings is None else flatten_dict(shardings, sep="/")

    params = {}
    for path, leaf in shapes.items():
        read = _parameter_reader(
            leaf, slots[path].layout, [part for part in wanted if part.path == path], stored
        )
        if shardings is None:
            params[path] = jax.device_put(read((slice(None),) * len(leaf.shape)))
        else:
            params[path] = jax.make_array_from_callback(
                leaf.shape, flat_shardings[path], read, dtype=leaf.dtype
            )
        # Transfers run in the background and would keep every host buffer until they end.
        params[path].block_until_ready()
        if config.int8 and int8.is_quantized(path):
            # At once, so that one parameter at a time is there in full.
            pair = path, path + int8.SCALE
            placed = None if shardings is None else tuple(flat_shardings[name] for name in pair)
            params |= dict(zip(pair, int8.quantize(path, params[path], placed), strict=True))
            params[path].block_until_ready()
    return unflatten_dict(params, sep="/")


def stored_dtype(folder: str | os.PathLike) -> np.dtype:
    """The narrowest dtype, of at most 32 bits, that holds all of a folder's weights unchanged.

    Raises:
      CheckpointError: no safetensors, a damaged file, or no weights of a floating dtype.
    """
    stored = _stored_tensors(_weight_files(Path(folder))[0]).values()
    found = {_FLOAT_TYPES[tensor.dtype] for tensor in stored if tensor.dtype in _FLOAT_TYPES}
    if not found:
        raise CheckpointError(
            f"{folder}: no weights of a floating dtype; accepted: a model's folder"
        )
    widest = functools.reduce(jnp.promote_types, found)
    return np.dtype(np.float32) if widest.itemsize > 4 else widest


# --- Saving --------------------------------------------------------------------------------------


class _Export(NamedTuple):
    """One tensor of an export.

    Attributes:
      layers: the parts of parameters that it is made of; none for a tensor that is carried over
        from the source.
      shape: its shape.
      dtype: what it is written in.
    """

    layers: list[Part]
    shape: tuple[int, ...]
    dtype: np.dtype


def _source_tensors(folder: Path, config: ModelConfig) -> dict[str, _Stored]:
    """The tensors of the folder that a model came from; none for one that came from its config."""
    has_weights = (folder / _SINGLE).is_file() or (folder / _INDEX).is_file()
    if not has_weights and config.model_type != "gemma3":
        return {}
    return _stored_tensors(_weight_files(folder)[0])


def _exports(
    slots: Mapping[str, Slot],
    config: ModelConfig,
    params: Mapping[str, Any],
    source: Mapping[str, _Stored],
) -> dict[str, _Export]:
    """The tensors of an export by name: layer by layer, as the model runs."""
    of_model = sorted(parts(slots, params), key=lambda p: -1 if p.layer is None else p.layer)
    shapes = whole_shapes(of_model)
    exports: dict[str, _Export] = {}
    for part in of_model:
        if part.name not in exports:
            dtype = np.dtype(params[part.path].dtype)
            found = source.get(part.name)
            if found is not None and found.dtype in _FLOAT_TYPES:
                theirs = _FLOAT_TYPES[found.dtype]
                # In a wider type than the parameters', nothing would be gained.
                dtype = theirs if theirs.itemsize <= dtype.itemsize else dtype
            exports[part.name] = _Export([], shapes[part.name], dtype)
        exports[part.name].layers.append(part)
    for name, found in source.items():
        if is_carried(config, name):
            if found.dtype not in _FLOAT_TYPES:
                raise CheckpointError(
                    f"{name} in {found.file}: {found.dtype} can't be carried over"
                )
            exports[name] = _Export([], found.shape, _FLOAT_TYPES[found.dtype])
    return exports


def _plan_shards(exports: Mapping[str, _Export]) -> list[list[str]]:
    """Cuts the tensors, in order, into runs of at most `_SHARD_BYTES` (or of one tensor)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, export in exports.items():
        size = math.prod(export.shape) * export.dtype.itemsize
        if shards[-1] and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _assembled(export: _Export, slots: Mapping[str, Slot], params: Mapping[str, Any]) -> np.ndarray:
    """A tensor of the export from the parameters that it is made of."""
    pieces = []
    for part in export.layers:
        value = params[part.path]
        # Only this layer comes to the host, not the whole stack.
        value = np.asarray(value if part.layer is None else value[part.layer])
        pieces.append(to_hf(value, slots[part.path].layout))
    whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return whole.astype(export.dtype, copy=False)


def _write_weights(
    folder: Path, config: ModelConfig, params: Mapping[str, Any], source: Mapping[str, _Stored]
) -> np.dtype:
    """Writes all tensors; returns the dtype of the embedding."""
    slots = table(config, text_prefix(source))
    exports = _exports(slots, config, params, source)
    shards = _plan_shards(exports)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = _SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for name in shard:
            if exports[name].layers:
                arrays[name] = _assembled(exports[name], slots, params)
            else:
                with _open(source[name].file) as opened:
                    arrays[name] = opened.get_tensor(name)
            weight_map[name] = file
            total += arrays[name].nbytes
        # transformers refuses safetensors files that do not say which framework laid them out.
        safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / _INDEX, index)
    return exports[slots["embedding"].name].dtype


def _check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
    expected = {
        path: leaf.shape for path, leaf in flatten_dict(abstract_params(config), sep="/").items()
    }
    found = {path: tuple(leaf.shape) for path, leaf in params.items()}
    if found != expected:
        wrong = sorted(
            path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)
        )
        raise CheckpointError(
            "the parameters do not fit the model's config: "
            + "; ".join(f"{p}: found {found.get(p)}, expected {expected.get(p)}" for p in wrong)
        )


def read_origin(folder: str | os.PathLike) -> Any:
    """The `origin` that `save` was given for this folder; None if it is no whole export."""
    folder = Path(folder)
    if not (folder / _MARKER).is_file() or not any(folder.glob("*.safetensors")):
        return None
    return _read_json(folder / _MARKER).get("origin")


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    source_folder: str | os.PathLike,
    chat_template: str | None = None,
    overwrite: bool = False,
    origin: Any = None,
) -> None:
    """Exports parameters as a Hugging Face folder that transformers loads.

    Writes safetensors (shards of 5 GB with an index above that size), and from `source_folder`
    config.json with its dtype brought up to date, tokenizer, chat template and generation config,
    and the tensors of parts that are not trained here, such as a vision tower. A tensor has the
    dtype that it has in `source_folder`, or the parameter's own if that is narrower. Everything
    goes to a folder beside the target first, so the target is whole or absent.

    Args:
      folder: where to write; may exist if it is empty or an earlier export.
      config: the model's config.
      params: the parameter tree, in any floating dtype.
      source_folder: the folder that the model was loaded from.
      chat_template: Jinja text that takes the place of the tokenizer's own template.
      overwrite: also replace a folder that is not an earlier export.
      origin: what the parameters are, as JSON values; see `read_origin`.

    Raises:
      CheckpointError: the target holds something else, the parameters do not fit `config`, or
        `source_folder` lacks config.json, or a vision tower that belongs into the export.
      OSError: the disk is full or the place can't be written; what was at `folder` stays.
    """
    source_folder = Path(source_folder)
    flat = flatten_dict(params, sep="/")
    _check_params(config, flat)
    content = _read_json(source_folder / "config.json")
    source = _source_tensors(source_folder, config)
    with replacing(folder, overwrite=overwrite, origin=origin) as temporary:
        copy_companions(source_folder, temporary, chat_template)
        try:
            dtype = _write_weights(temporary, config, flat, source)
        except SafetensorError as error:
            raise OSError(f"could not write the weights of {folder}: {error}") from error
        # transformers 5 writes `dtype`, earlier versions know only `torch_dtype`.
        for key in {"dtype", "torch_dtype"} & content.keys() or {"torch_dtype"}:
            content[key] = dtype.name
        write_json(temporary / "config.json", content)


def copy_companions(source_folder: Path, folder: Path, chat_template: str | None) -> None:
    """Copies tokenizer, processor, chat templates and generation config.

    Args:
      source_folder: where from.
      folder: where to.
      chat_template: Jinja text that takes the place of the tokenizer's own default template.
    """
    for pattern in (*_COMPANIONS, f"{_TEMPLATES}/*.jinja"):
        for companion in filter(Path.is_file, source_folder.glob(pattern)):
            target = folder / companion.relative_to(source_folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(companion, target)
    if chat_template is None:
        return
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    # Earlier versions of transformers look into these, where a template was before.
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            content = _read_json(folder / name)
            if "chat_template" in content:
                write_json(folder / name, content | {"chat_template": chat_template})


@contextlib.contextmanager
def replacing(folder: str | os.PathLike, *, overwrite: bool, origin: Any = None) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when all in it is written, or vanishes.

    Args:
      folder: the target; may exist if it is empty or an earlier export.
      overwrite: also replace a folder that is not an earlier export.
      origin: what the export is made of, as JSON values; see `read_origin`.

    Raises:
      CheckpointError: the target holds something else.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; an export needs a folder")
    clear_up(folder)
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not overwrite and not (folder / _MARKER).is_file():
        raise CheckpointError(
            f"{folder} holds files that are not an earlier export; choose another folder, or pass "
            "overwrite=True to replace it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        write_json(temporary / _MARKER, {"written_by": "attnpo_jax", "origin": origin})
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            # The safetensors writer makes private files; the weights are as readable as the rest.
            shutil.copymode(temporary / _MARKER, file)
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if occupied:
            # A folder can't be renamed onto a full one; the old one steps aside for a moment.
            old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old")
            os.rename(folder, old)
            try:
                os.rename(temporary, folder)
            except OSError:
                os.rename(old, folder)
                raise
            shutil.rmtree(old)
        else:
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_up(folder: str | os.PathLike) -> None:
    """Removes what killed exports to `folder` have left, but for the one that was in its place.

    There must be no other export to it at this time.
    """
    folder = Path(folder).absolute()
    for path in sorted(folder.parent.glob(".*")):
        left = re.fullmatch(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{32}}\.(tmp|old)", path.name)
        if left is None:
            continue
        if left[1] == "old" and not folder.exists():
            os.rename(path, folder)
        else:
            shutil.rmtree(path)


# --- Telling checkpoints apart -------------------------------------------------------------------


def weights_digest(folder: str | os.PathLike) -> str:
    """A sha256 (hex) that tells a folder's weights from others without reading all of them.

    It covers, for each safetensors file in order of name: the name, the size, the header (tensor
    names, types, shapes, places), and 256 blocks of 4 KiB evenly spread from the first byte of the
    data to the last. Any training step changes nearly all values and so the digest; an edit of a
    few values in a large file can go unnoticed. The configuration is not covered.

    Raises:
      CheckpointError: the folder has no safetensors, or a file is cut short.
    """
    digest = hashlib.sha256()
    for path in _weight_files(Path(folder))[0]:
        with _open(path):  # refuses a damaged header, or a size that does not fit it
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
