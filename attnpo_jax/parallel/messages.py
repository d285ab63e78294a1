"""What processes say to each other in an exchange: JSON, signed, after its length.

A header of a fixed size comes first, with the length and a signature of it; so nothing is made room
for, or read, that another process of the run has not said.
"""

import json
from typing import Any

import numpy as np

from attnpo_jax.parallel.secret import SIGNATURE_BYTES, Key
from attnpo_jax.runtime import json_files, schema
from attnpo_jax.runtime.errors import UserError

MOST_BYTES = 2**30
_LENGTH_BYTES = 8
HEADER_BYTES = _LENGTH_BYTES + SIGNATURE_BYTES


class MessageError(UserError):
    """What another process has said is not what this one can take."""


def write(key: Key, number: int, process: int, value: Any) -> tuple[np.ndarray, np.ndarray]:
    """A message's header, uint8 (HEADER_BYTES,), and its body, uint8.

    Args:
      number: of the exchange.
      process: who says it.
      value: JSON; tuples become lists.

    Raises:
      TypeError, ValueError: it is no JSON.
      MessageError: it is too long.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    body = text + key.sign(f"body {number}", process, text)
    if len(body) > MOST_BYTES:
        raise MessageError(
            f"process {process} has {len(body)} bytes to say to the others; accepted: "
            f"{MOST_BYTES}, that is fewer pairs at once (prepare.rows_per_shard, or the data)"
        )
    length = len(body).to_bytes(_LENGTH_BYTES, "big")
    header = length + key.sign(f"header {number}", process, length)
    return np.frombuffer(header, np.uint8), np.frombuffer(body, np.uint8)


def length(key: Key, number: int, process: int, header: np.ndarray) -> int:
    """The body's length that a header tells.

    Raises:
      MessageError: the process has not signed it, or it is no length.
    """
    told, signature = header[:_LENGTH_BYTES].tobytes(), header[_LENGTH_BYTES:].tobytes()
    if not key.holds(f"header {number}", process, told, signature):
        raise MessageError(_unsigned(process))
    found = int.from_bytes(told, "big")
    if not SIGNATURE_BYTES < found <= MOST_BYTES:
        raise MessageError(f"process {process} says that it has {found} bytes to say")
    return found


def read(key: Key, number: int, process: int, body: np.ndarray, form: schema.Form) -> Any:
    """The value that a body holds.

    Raises:
      MessageError: the process has not signed it, or it has another form.
    """
    text, signature = body[:-SIGNATURE_BYTES].tobytes(), body[-SIGNATURE_BYTES:].tobytes()
    if not key.holds(f"body {number}", process, text, signature):
        raise MessageError(_unsigned(process))
    try:
        value = json_files.loads(text)
        schema.check(value, form)
    except ValueError as error:
        raise MessageError(
            f"process {process} says something else than this one expects ({error}); accepted: "
            "the same version, command and config for all processes"
        ) from error
    return value


def _unsigned(process: int) -> str:
    return (
        f"what process {process} says is not signed with the key of this run: it comes from "
        "elsewhere, or the processes are not in step; accepted: the same version, command and "
        "config for all processes"
    )
