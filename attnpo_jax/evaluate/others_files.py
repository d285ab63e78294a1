"""Files of other programs: JSON lists and JSON lines, read so that what is wrong is one message."""

import json
import pathlib
import string
from collections.abc import Iterable, Mapping
from typing import Any

from attnpo_jax.runtime import atomic, json_files, schema
from attnpo_jax.runtime.errors import UserError

_MOST_BYTES = 2**30


def path_of(text: str) -> pathlib.Path:
    """A path that a config has."""
    return pathlib.Path(text).expanduser()


def read_list(file: pathlib.Path, form: schema.Form) -> list[dict[str, Any]]:
    """The objects of a JSON list.

    Raises:
      UserError: it is none, an object has another form, or there is none.
      OSError: it can't be read.
    """
    try:
        rows = json_files.loads(_content(file))
    except ValueError as error:
        raise UserError(f"{file}: {error}; accepted: a JSON list of objects") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: {type(rows).__name__}; accepted: a JSON list of objects, not []")
    for number, row in enumerate(rows, 1):
        _check(row, form, f"{file}, entry {number}")
    return rows


def read_lines(file: pathlib.Path, form: schema.Form) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; blank lines are left out.

    Raises:
      UserError: a line is none, has another form, or there is none.
      OSError: it can't be read.
    """
    rows = []
    for number, line in enumerate(_content(file).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json_files.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
        _check(row, form, f"{file}, line {number}")
        rows.append(row)
    if not rows:
        raise UserError(f"{file}: empty; accepted: a JSON object a line")
    return rows


def write_list(file: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON list, its folder too, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_atomically(file, (json.dumps(list(rows), indent=2) + "\n").encode())


def files_in(path: pathlib.Path, ending: str) -> list[pathlib.Path]:
    """A file, or a folder's files with an ending, by name.

    Raises:
      UserError: the folder has none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(path.glob(f"*{ending}"))
    if not found:
        raise UserError(f"{path}: no *{ending} there; accepted: such a file, or a folder of them")
    return found


def fill(template: str, origin: str, **texts: str) -> str:
    """A template with texts in place of `{name}`; `{{` and `}}` are single ones.

    What the texts hold is not read as a template.

    Args:
      origin: what the template is of, for the message.

    Raises:
      UserError: it asks for something else, or braces do not match.
    """
    parts = []
    try:
        for literal, name, form, conversion in string.Formatter().parse(template):
            parts.append(literal)
            if name is not None:
                if name not in texts or form or conversion:
                    raise ValueError(f"{{{name}}} is not known")
                parts.append(texts[name])
    except ValueError as error:
        accepted = ", ".join(f"{{{name}}}" for name in texts)
        raise UserError(f"{origin}: {error}; accepted: {accepted}") from None
    return "".join(parts)


def _content(file: pathlib.Path) -> bytes:
    size = file.stat().st_size
    if size > _MOST_BYTES:
        raise UserError(f"{file}: {size} bytes; accepted: {_MOST_BYTES} at most")
    return file.read_bytes()


def _check(row: Any, form: schema.Form, where: str) -> None:
    try:
        schema.check(row, form)
    except schema.SchemaError as error:
        raise UserError(f"{where}: {error}") from None
