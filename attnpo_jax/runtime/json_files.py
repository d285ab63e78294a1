"""JSON from elsewhere, read so that whatever is wrong with it is one message."""

import json
import pathlib
from typing import Any, NoReturn

from attnpo_jax.runtime import schema
from attnpo_jax.runtime.errors import UserError

MOST_BYTES = 256 * 2**20


def loads(content: bytes) -> Any:
    """The value that some bytes of UTF-8 spell.

    Raises:
      ValueError: they are no JSON, too deeply nested, or hold NaN, Infinity or a number too long.
    """
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def read(file: pathlib.Path, form: schema.Form, remedy: str) -> Any:
    """What a JSON file holds, checked.

    Args:
      form: what it must hold.
      remedy: what to do with a file that holds something else; ends the message.

    Raises:
      UserError: it is no JSON, or has another form.
      OSError: it can't be read.
    """
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes; accepted: {MOST_BYTES} at most")
        value = loads(file.read_bytes())
        schema.check(value, form)
    except ValueError as error:
        raise UserError(f"{file}: damaged, or not written by attnpo ({error}); {remedy}") from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
