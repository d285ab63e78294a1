"""HF folders out: exports that transformers loads, whole or absent."""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError

from attnpo_jax.models.decoder import ModelConfig, abstract_params
from attnpo_jax.models.io import hf_config
from attnpo_jax.models.io.hf_folder import (
    COMPANIONS,
    FLOAT_TYPES,
    INDEX,
    SINGLE,
    TEMPLATES,
    FolderError,
    Stored,
    check_links,
    open_file,
    read_json,
    stored_tensors,
    weight_files,
)
from attnpo_jax.models.io.tensors import (
    Part,
    Slot,
    by_full_name,
    is_carried,
    parts,
    table,
    text_prefix,
    to_hf,
    whole_shapes,
)
from attnpo_jax.runtime import disk, json_files, paths, schema
from attnpo_jax.runtime.errors import UserError

_LOG = logging.getLogger(__name__)

_MARKER = "attnpo_export.json"
_MARKER_FORM = schema.Table(
    {"files": schema.Mapped(schema.Whole()), "origin": schema.Anything()}, open=True
)
_SHARD_BYTES = 5 * 10**9


class _Export(NamedTuple):
    """One tensor of an export."""

    # The parts of parameters that it is made of; none for a tensor that is carried over from the
    # source.
    layers: list[Part]
    shape: tuple[int, ...]
    dtype: np.dtype  # what it is written in


def _source_tensors(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """The tensors of the folder that a model came from; none for one that came from its config.

    Under the names that they have in a model with its head, whatever the folder calls them.
    """
    has_weights = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    if not has_weights and config.model_type != "gemma3":
        return {}
    return by_full_name(config, stored_tensors(weight_files(folder)[0]))


def _exports(
    slots: Mapping[str, Slot],
    config: ModelConfig,
    params: Mapping[str, Any],
    source: Mapping[str, Stored],
) -> dict[str, _Export]:
    """The tensors of an export by name: layer by layer, as the model runs."""
    of_model = sorted(parts(slots, params), key=lambda p: -1 if p.layer is None else p.layer)
    shapes = whole_shapes(of_model)
    exports: dict[str, _Export] = {}
    for part in of_model:
        if part.name not in exports:
            dtype = np.dtype(params[part.path].dtype)
            found = source.get(part.name)
            if found is not None and found.dtype in FLOAT_TYPES:
                theirs = FLOAT_TYPES[found.dtype]
                # In a wider type than the parameters', nothing would be gained.
                dtype = theirs if theirs.itemsize <= dtype.itemsize else dtype
            exports[part.name] = _Export([], shapes[part.name], dtype)
        exports[part.name].layers.append(part)
    for name, found in source.items():
        if is_carried(config, name):
            if found.dtype not in FLOAT_TYPES:
                raise FolderError(f"{name} in {found.file}: {found.dtype} can't be carried over")
            exports[name] = _Export([], found.shape, FLOAT_TYPES[found.dtype])
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
    folder: Path, config: ModelConfig, params: Mapping[str, Any], source: Mapping[str, Stored]
) -> np.dtype:
    """Writes all tensors; returns the dtype of the embedding."""
    slots = table(config, text_prefix(source))
    exports = _exports(slots, config, params, source)
    shards = _plan_shards(exports)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for name in shard:
            if exports[name].layers:
                arrays[name] = _assembled(exports[name], slots, params)
            else:
                with open_file(source[name].file) as opened:
                    arrays[name] = opened.get_tensor(source[name].name)
            weight_map[name] = file
            total += arrays[name].nbytes
        # transformers refuses safetensors files that do not say which framework laid them out.
        safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)
    return exports[slots["embedding"].name].dtype


def _check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
    wanted = flatten_dict(abstract_params(config), sep="/")
    expected, found = ({p: tuple(x.shape) for p, x in tree.items()} for tree in (wanted, params))
    if found != expected:
        wrong = sorted({path for path, _ in expected.items() ^ found.items()})
        raise FolderError(
            "the parameters do not fit the model's config: "
            + "; ".join(f"{p}: found {found.get(p)}, expected {expected.get(p)}" for p in wrong)
        )


def read_origin(folder: str | os.PathLike) -> Any:
    """The `origin` that an export was given; None for a folder that lacks files of one."""
    folder = Path(folder)
    if not (folder / _MARKER).is_file():
        return None
    try:
        marker = json_files.read(folder / _MARKER, _MARKER_FORM, "it is exported again")
    except UserError as error:
        _LOG.warning("%s", error)
        return None
    whole = all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in marker["files"].items()
    )
    return marker["origin"] if whole else None


def companions_digest(source_folder: str | os.PathLike) -> str:
    """A sha256 (hex) of the files that an export takes from the folder its model came from."""
    source_folder, digest = Path(source_folder), hashlib.sha256()
    for file in (source_folder / "config.json", *_companions(source_folder)):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(source_folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _companions(source_folder: Path) -> list[Path]:
    check_links(source_folder)
    patterns = (*COMPANIONS, f"{TEMPLATES}/*.jinja")
    found = {file for pattern in patterns for file in source_folder.glob(pattern)}
    return sorted(filter(Path.is_file, found))


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
    """Exports parameters as an HF folder that transformers loads.

    Writes safetensors (shards of 5 GB with an index above that size), and from `source_folder`
    config.json brought up to date, tokenizer, chat template and generation config, and the tensors
    of parts that are not trained here, such as a vision tower. A tensor has the dtype that it has
    in `source_folder`, or the parameter's own if that is narrower. Everything
    goes to a folder beside the target first, so the target is whole or absent.

    Args:
      folder: where to write; may exist if it is empty or an earlier export.
      source_folder: the folder that the model was loaded from.
      chat_template: Jinja text that takes the place of the tokenizer's own template.
      overwrite: also replace a folder that is not an earlier export.
      origin: what the parameters are, as JSON values; see `read_origin`.

    Raises:
      OSError: the disk is full or the place can't be written; what was at `folder` stays.
    """
    source_folder = Path(source_folder)
    flat = flatten_dict(params, sep="/")
    _check_params(config, flat)
    content = read_json(source_folder / "config.json")
    source = _source_tensors(source_folder, config)
    with replacing(folder, overwrite=overwrite, origin=origin) as temporary:
        copy_companions(source_folder, temporary, chat_template)
        dtype = _write_weights(temporary, config, flat, source)
        write_json(temporary / "config.json", _config_of_export(content, config, dtype))


def _config_of_export(
    content: Mapping[str, Any], config: ModelConfig, dtype: np.dtype
) -> dict[str, Any]:
    """The source's config.json, with what an export has other than the source may have."""
    content = dict(content)
    # transformers 5 writes `dtype`, earlier versions know only `torch_dtype`.
    for key in {"dtype", "torch_dtype"} & content.keys() or {"torch_dtype"}:
        content[key] = dtype.name
    if hf_config.read(content).tie_word_embeddings != config.tie_word_embeddings:
        content["tie_word_embeddings"] = config.tie_word_embeddings
    # The tensors have the names of a model with its head; a source without one says otherwise.
    if isinstance(content.get("architectures"), list):
        content["architectures"] = [_with_head(name) for name in content["architectures"]]
    return content


def _with_head(architecture: str) -> str:
    """transformers' name for a model with its head, from its name for the same without."""
    if architecture == "Gemma3Model":
        return "Gemma3ForConditionalGeneration"
    return re.sub("(Text)?Model$", "ForCausalLM", architecture)


def copy_companions(source_folder: Path, folder: Path, chat_template: str | None) -> None:
    """Copies tokenizer, processor, chat templates and generation config.

    `chat_template`, if given, takes the place of the tokenizer's own default template.
    """
    for companion in _companions(source_folder):
        target = folder / companion.relative_to(source_folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(companion, target)
    _name_for_transformers_4(folder / "tokenizer_config.json")
    if chat_template is None:
        return
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    # Earlier versions of transformers look into these, where a template was before.
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            if "chat_template" in content:
                write_json(folder / name, content | {"chat_template": chat_template})


def _name_for_transformers_4(file: Path) -> None:
    """Replaces what transformers 5 writes to a tokenizer's config and 4 fails at.

    By the names of version 4, which 5 takes too; a file without them stays as it is.
    """
    if not file.is_file():
        return
    content = old = read_json(file)
    if old.get("tokenizer_class") == "TokenizersBackend":
        content = content | {"tokenizer_class": "PreTrainedTokenizerFast"}
    # Special tokens without a role; version 4 takes this name for a table of roles.
    if isinstance(old.get("extra_special_tokens"), list):
        unnamed = old["extra_special_tokens"]
        content = {k: v for k, v in content.items() if k != "extra_special_tokens"}
        content = {"additional_special_tokens": unnamed} | content
    if content is not old:
        write_json(file, content)


@contextlib.contextmanager
def replacing(folder: str | os.PathLike, *, overwrite: bool, origin: Any = None) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when all in it is written, or vanishes.

    Args:
      overwrite: also replace a folder that is not an earlier export.
      origin: what the export is made of, as JSON values; see `read_origin`.
    """
    folder = paths.followed(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder} is a file; an export needs a folder")
    clear_up(folder)
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not overwrite and not (folder / _MARKER).is_file():
        raise FolderError(
            f"{folder} holds files that are not an earlier export; choose another folder, or pass "
            "overwrite=True to replace it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(filter(Path.is_file, temporary.rglob("*")))
        sizes = {file.relative_to(temporary).as_posix(): file.stat().st_size for file in files}
        marker = {"written_by": "attnpo_jax", "origin": origin, "files": sizes}
        write_json(temporary / _MARKER, marker)
        for file in (*files, temporary / _MARKER):
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
    except SafetensorError as error:
        raise disk.as_os_error(error, str(folder)) from error
    except OSError as error:
        # What it names lies in the temporary folder, if it names anything.
        if disk.shortage(error) is None:
            raise
        raise disk.as_os_error(error, str(folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_up(folder: str | os.PathLike) -> None:
    """Removes what killed exports to `folder` have left, but for the one that was in its place.

    There must be no other export to it at this time.
    """
    folder = paths.followed(folder).absolute()
    for path in sorted(folder.parent.glob(".*")):
        left = re.fullmatch(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{32}}\.(tmp|old)", path.name)
        if left is None:
            continue
        if left[1] == "old" and not folder.exists():
            os.rename(path, folder)
        else:
            shutil.rmtree(path)
