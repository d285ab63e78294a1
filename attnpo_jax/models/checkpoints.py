"""Hugging Face checkpoint folders in and out: config.json, safetensors and the files beside them.

Weights are read and written as safetensors alone; pickled checkpoints (*.bin, *.pt) are refused.
"""

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
import ml_dtypes  # noqa: F401  numpy learns bfloat16 by this import
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from attnpo_jax.models import embedded
from attnpo_jax.models.decoder import ModelConfig, abstract_params

__all__ = ["CheckpointError", "load_config", "load_params", "resolve", "save", "weights_digest"]

# How a tensor of ours (without the layer axis) becomes Hugging Face's: for each axis there, the
# axes of ours that it merges, in order. Linear weights are (out, in) there, (in, out) here.
_SAME_VECTOR = ((0,),)
_SAME_MATRIX = ((0,), (1,))
_TRANSPOSED = ((1,), (0,))
_HEADS_OUT = ((1, 2), (0,))  # (D, N, H) -> (N * H, D)
_HEADS_IN = ((2,), (0, 1))  # (N, H, D) -> (D, N * H)
_HEADS_BIAS = ((0, 1),)  # (N, H) -> (N * H,)

# The one table of names, for loading and saving alike. Which of the optional ones a model has
# follows from `abstract_params`.
_TABLE = {
    "embedding": ("model.embed_tokens.weight", _SAME_MATRIX),
    "final_norm": ("model.norm.weight", _SAME_VECTOR),
    "lm_head": ("lm_head.weight", _SAME_MATRIX),
    "layers/attention_norm": ("model.layers.{layer}.input_layernorm.weight", _SAME_VECTOR),
    "layers/query": ("model.layers.{layer}.self_attn.q_proj.weight", _HEADS_OUT),
    "layers/key": ("model.layers.{layer}.self_attn.k_proj.weight", _HEADS_OUT),
    "layers/value": ("model.layers.{layer}.self_attn.v_proj.weight", _HEADS_OUT),
    "layers/output": ("model.layers.{layer}.self_attn.o_proj.weight", _HEADS_IN),
    "layers/query_bias": ("model.layers.{layer}.self_attn.q_proj.bias", _HEADS_BIAS),
    "layers/key_bias": ("model.layers.{layer}.self_attn.k_proj.bias", _HEADS_BIAS),
    "layers/value_bias": ("model.layers.{layer}.self_attn.v_proj.bias", _HEADS_BIAS),
    "layers/output_bias": ("model.layers.{layer}.self_attn.o_proj.bias", _SAME_VECTOR),
    "layers/mlp_norm": ("model.layers.{layer}.post_attention_layernorm.weight", _SAME_VECTOR),
    "layers/gate": ("model.layers.{layer}.mlp.gate_proj.weight", _TRANSPOSED),
    "layers/up": ("model.layers.{layer}.mlp.up_proj.weight", _TRANSPOSED),
    "layers/down": ("model.layers.{layer}.mlp.down_proj.weight", _TRANSPOSED),
    "layers/gate_bias": ("model.layers.{layer}.mlp.gate_proj.bias", _SAME_VECTOR),
    "layers/up_bias": ("model.layers.{layer}.mlp.up_proj.bias", _SAME_VECTOR),
    "layers/down_bias": ("model.layers.{layer}.mlp.down_proj.bias", _SAME_VECTOR),
}

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOAT_TYPES = ("F32", "BF16", "F16", "F64")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    "*.jinja",
)
_MARKER = "attnpo_export.json"
_SHARD_BYTES = 5 * 10**9


class CheckpointError(ValueError):
    """A checkpoint folder can't be used; the message names the file or tensor and what is wrong."""


class _Tensor(NamedTuple):
    """One tensor of a parameter, as Hugging Face has it: `layer` is None for unstacked ones."""

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]


class _Stored(NamedTuple):
    """Where a tensor lies on disk and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


# --- Finding and reading a folder ----------------------------------------------------------------


def resolve(source: str | os.PathLike) -> Path:
    """The local folder of a model.

    Args:
      source: a local Hugging Face folder, the alias `smollm2-135m-instruct`, or a hub id
        `owner/name`, which is downloaded: safetensors, configuration and tokenizer alone.

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
    try:
        downloaded = huggingface_hub.snapshot_download(
            text,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model"],
            # Folders inside a repository hold other formats of the same weights.
            ignore_patterns=["*/*"],
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


# --- The two layouts -----------------------------------------------------------------------------


def _hf_shape(shape: tuple[int, ...], layout) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis] for axis in group) for group in layout)


def _tensors(shapes: Mapping[str, Any]) -> Iterator[_Tensor]:
    """Every Hugging Face tensor of a model, given its flat tree of shapes; grouped by parameter."""
    for path, leaf in shapes.items():
        template, layout = _TABLE[path]
        if not path.startswith("layers/"):
            yield _Tensor(template, path, None, _hf_shape(leaf.shape, layout))
            continue
        for layer in range(leaf.shape[0]):
            name = template.format(layer=layer)
            yield _Tensor(name, path, layer, _hf_shape(leaf.shape[1:], layout))


def _to_hf(value: np.ndarray, layout) -> np.ndarray:
    order = [axis for group in layout for axis in group]
    return np.ascontiguousarray(value.transpose(order).reshape(_hf_shape(value.shape, layout)))


def _read_part(stored: _Stored, name: str, shape, layout, bounds) -> np.ndarray:
    """The part within `bounds` (start and stop for each axis of ours) of a tensor, in our layout.

    Of a merged axis, the file is sliced along its outermost axis of ours; only that range is read.
    """
    cut, split, rest = [], [], []
    for group in layout:
        outer, *inner = group
        block = math.prod(shape[axis] for axis in inner)
        start, stop = bounds[outer]
        cut.append(slice(start * block, stop * block))
        split += [stop - start, *(shape[axis] for axis in inner)]
        rest += [slice(None), *(slice(*bounds[axis]) for axis in inner)]
    # Opened anew for every tensor: pages of a file that stays mapped would count as our memory.
    with _open(stored.file) as opened:
        read = opened.get_slice(name)[tuple(cut)]
    order = [axis for group in layout for axis in group]
    return read.reshape(split)[tuple(rest)].transpose(np.argsort(order))


# --- Loading -------------------------------------------------------------------------------------


def _check_stored(
    folder: Path,
    wanted: list[_Tensor],
    stored: Mapping[str, _Stored],
    weight_map: Mapping[str, str],
) -> None:
    """Raises one error that names every missing, extra, misshapen and non-float tensor."""
    missing, misshapen, not_float = [], [], []
    for tensor in wanted:
        found = stored.get(tensor.name)
        if found is None:
            file = weight_map.get(tensor.name, _INDEX if weight_map else _SINGLE)
            missing.append(f"{tensor.name} (not in {file})")
        elif found.shape != tensor.shape:
            misshapen.append(
                f"{tensor.name} in {found.file.name}: found {found.shape}, expected {tensor.shape}"
            )
        elif found.dtype not in _FLOAT_TYPES:
            not_float.append(f"{tensor.name} in {found.file.name}: {found.dtype}")
    known = {tensor.name for tensor in wanted}
    # A tied head and the rotary table are copies of what the model has or computes anyway.
    known.add(_TABLE["lm_head"][0])
    extra = [
        f"{name} in {found.file.name}"
        for name, found in stored.items()
        if name not in known and not name.endswith("rotary_emb.inv_freq")
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
    tensors: list[_Tensor],
    stored: Mapping[str, _Stored],
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function from an index (one slice an axis) to that part of a parameter, in its dtype."""
    stacked = tensors[0].layer is not None
    shape = leaf.shape if stacked else (1, *leaf.shape)
    # Devices that hold copies of one part ask for it one after the other.
    parts: dict[tuple, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        full = index if stacked else (slice(None), *index)
        bounds = tuple(part.indices(size)[:2] for part, size in zip(full, shape, strict=True))
        if bounds in parts:
            return parts[bounds]
        # Converted while it is copied into place: no second copy of the stack is made.
        stack = np.empty([stop - start for start, stop in bounds], leaf.dtype)
        for row, tensor in enumerate(tensors[slice(*bounds[0])]):
            found = stored[tensor.name]
            stack[row] = _read_part(found, tensor.name, shape[1:], layout, bounds[1:])
        parts[bounds] = stack if stacked else stack[0]
        return parts[bounds]

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
      config: the folder's config (see `load_config`).
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
    shapes = flatten_dict(abstract_params(config, param_dtype), sep="/")
    wanted = list(_tensors(shapes))
    stored = _stored_tensors(files)
    _check_stored(folder, wanted, stored, weight_map)
    flat_shardings = {} if shardings is None else flatten_dict(shardings, sep="/")

    params = {}
    for path, leaf in shapes.items():
        read = _parameter_reader(
            leaf, _TABLE[path][1], [tensor for tensor in wanted if tensor.path == path], stored
        )
        if shardings is None:
            params[path] = jax.device_put(read((slice(None),) * len(leaf.shape)))
        else:
            params[path] = jax.make_array_from_callback(
                leaf.shape, flat_shardings[path], read, dtype=leaf.dtype
            )
        # Transfers run in the background and would keep every host buffer until they end.
        params[path].block_until_ready()
    return unflatten_dict(params, sep="/")


# --- Saving --------------------------------------------------------------------------------------


def _plan_shards(tensors: list[_Tensor], params: Mapping[str, Any]) -> list[list[_Tensor]]:
    """Cuts the tensors, in order, into runs of at most `_SHARD_BYTES` (or of one tensor)."""
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * params[tensor.path].dtype.itemsize
        if shards[-1] and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _write_weights(folder: Path, params: Mapping[str, Any]) -> None:
    # Layer by layer, as the model runs, and not parameter by parameter.
    tensors = sorted(_tensors(params), key=lambda t: -1 if t.layer is None else t.layer)
    shards = _plan_shards(tensors, params)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = _SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for tensor in shard:
            value = params[tensor.path]
            # Only this layer comes to the host, not the whole stack.
            value = np.asarray(value if tensor.layer is None else value[tensor.layer])
            arrays[tensor.name] = _to_hf(value, _TABLE[tensor.path][1])
            weight_map[tensor.name] = file
            total += arrays[tensor.name].nbytes
        # transformers refuses safetensors files that do not say which framework laid them out.
        safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / _INDEX, index)


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


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    source_folder: str | os.PathLike,
    overwrite: bool = False,
) -> None:
    """Exports parameters as a Hugging Face folder that transformers loads.

    Writes safetensors (shards of 5 GB with an index above that size), and from `source_folder`
    config.json with its dtype brought up to date, tokenizer, chat template and generation config.
    Everything goes to a folder beside the target first, so the target is whole or absent.

    Args:
      folder: where to write; may exist if it is empty or an earlier export.
      config: the model's config.
      params: the parameter tree; tensors keep their dtype.
      source_folder: the folder that the model was loaded from.
      overwrite: also replace a folder that is not an earlier export.

    Raises:
      CheckpointError: the target holds something else, the parameters do not fit `config`, or
        `source_folder` has no config.json.
      OSError: the disk is full or the place can't be written; what was at `folder` stays.
    """
    folder, source_folder = Path(folder).absolute(), Path(source_folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; an export needs a folder")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not overwrite and not (folder / _MARKER).is_file():
        raise CheckpointError(
            f"{folder} holds files that are not an earlier export; choose another folder, or pass "
            "overwrite=True to replace it"
        )
    flat = flatten_dict(params, sep="/")
    _check_params(config, flat)
    content = _read_json(source_folder / "config.json")
    # transformers 5 writes `dtype`, earlier versions know only `torch_dtype`; as the source has it.
    for key in {"dtype", "torch_dtype"} & content.keys() or {"torch_dtype"}:
        content[key] = flat["embedding"].dtype.name

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        _write_json(temporary / "config.json", content)
        for pattern in _COMPANIONS:
            for companion in source_folder.glob(pattern):
                shutil.copyfile(companion, temporary / companion.name)
        _write_json(temporary / _MARKER, {"written_by": "attnpo_jax"})
        try:
            _write_weights(temporary, flat)
        except SafetensorError as error:
            raise OSError(f"could not write the weights of {folder}: {error}") from error
        for file in temporary.iterdir():
            # The safetensors writer makes private files; the weights are as readable as the rest.
            shutil.copymode(temporary / "config.json", file)
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
