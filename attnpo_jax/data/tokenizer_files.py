"""Tokenizers from the files of a folder, which may be broken, or made to break something."""

import json
import logging
import pathlib
from typing import Any

import tokenizers
import transformers

from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import Formatter

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these is needed."""

_SETTINGS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# No tokenizer has more; tables by id are made of this size.
_MOST_IDS = 1 << 24
# Bytes of a file, several times those of the largest tokenizers.
_LARGEST = 1 << 28


def load(folder: str | pathlib.Path) -> tuple[transformers.PreTrainedTokenizerBase, bytes | None]:
    """The tokenizer of a Hugging Face folder, and its tokenizer.json if there is one.

    No code of the folder is run.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      UserError: a file is broken; the message names it.
    """
    folder = pathlib.Path(folder)
    there = [name for name in FILES if (folder / name).is_file()]
    if not there:
        raise FileNotFoundError(
            f"{folder} holds no tokenizer; model.source must have one of {', '.join(FILES)}"
        )
    for name in _SETTINGS:
        if (folder / name).is_file():
            content = _read_json(folder / name)
            # Before transformers makes room for them: 5.0 takes 15 GB for an id of four billion.
            if ids := _ids(content):
                check_ids(ids, str(folder / name))
    tokenizer = _from_pretrained(str(folder), str(folder / there[0]))
    check_ids(tokenizer.get_vocab(), str(folder / there[0]))
    template = tokenizer.chat_template
    named = template.values() if isinstance(template, dict) else [template]
    if not all(isinstance(text, str | None) for text in named):
        raise UserError(
            f"{folder}/tokenizer_config.json: chat_template is no text; accepted: Jinja text, or a "
            "list of named ones"
        )
    file = folder / "tokenizer.json"
    return tokenizer, file.read_bytes() if file.is_file() else None


def load_backend(source: str) -> tokenizers.Tokenizer:
    """The fast tokenizer of a Hugging Face folder or hub id, without its chat template."""
    tokenizer = load(source)[0] if pathlib.Path(source).is_dir() else _from_pretrained(source)
    if not tokenizer.is_fast:
        raise UserError(f"{source}: not a fast tokenizer (tokenizer.json)")
    return tokenizer.backend_tokenizer


def check_ids(vocabulary: dict[str, int], origin: str) -> None:
    """Raises UserError where a token has an id that no tokenizer has."""
    if not vocabulary:
        raise UserError(f"{origin}: a tokenizer without tokens")
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if largest >= _MOST_IDS:
        raise UserError(
            f"{origin}: the token {token[:60]!r} has the id {largest}; accepted: below {_MOST_IDS}"
        )


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    if (size := file.stat().st_size) > _LARGEST:
        raise UserError(f"{file} has {size} bytes; accepted: up to {_LARGEST}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def _ids(content: dict[str, Any]) -> dict[str, int]:
    """By token, the ids that the content of a tokenizer.json has, where it has a vocabulary."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # Unigram models have a list of pieces: their ids are their places.
    named = vocabulary.items() if isinstance(vocabulary, dict) else ()
    return {token: number for token, number in named if isinstance(number, int)}


def _from_pretrained(source: str, file: str | None = None) -> Any:
    # What transformers says of a tokenizer may be the tokenizer's own words.
    for handler in logging.getLogger("transformers").handlers:
        handler.setFormatter(Formatter("%(message)s"))
    try:
        return transformers.AutoTokenizer.from_pretrained(
            source, use_fast=True, trust_remote_code=False
        )
    except BaseException as error:
        # Whatever transformers and tokenizers meet in the files; a panic in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:300] or "nothing"
        raise UserError(
            f"{file or source}: transformers can't load the tokenizer ({type(error).__name__}: "
            f"{said}); accepted: a whole tokenizer.json, without code of its own"
        ) from error
