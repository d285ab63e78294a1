"""Lines of JSON that tell when they are damaged: the last key of each is `check`.

It holds the CRC-32 (eight hexadecimal digits) of the bytes before `, "check"`.
"""

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

_CHECKED = re.compile(rb'(.*), "check": "([0-9a-f]{8})"\}', re.DOTALL)


def encode(values: Mapping[str, Any]) -> bytes:
    """A line with its check and its end, of values that JSON has; one of them at least."""
    text = json.dumps(values, allow_nan=False).encode()[:-1]
    return text + b', "check": "%08x"}\n' % zlib.crc32(text)


def is_whole(text: bytes) -> bool:
    """Whether a line, without its end, has a check that is right."""
    match = _CHECKED.fullmatch(text)
    return match is not None and zlib.crc32(match[1]) == int(match[2], 16)
