"""Which training steps `log.profile` names."""

import re

_FORM = re.compile(r"([1-9][0-9]{0,8}):([1-9][0-9]{0,8})")
ACCEPTED = "'', or START:STOP, steps from 1 on with START below STOP, as 10:13"


def profiled(text: str) -> range:
    """The training steps that are profiled, counted from 1.

    Args:
      text: `START:STOP`, the first step and the one after the last; "" for none.

    Raises:
      ValueError: it is neither.

    >>> list(profiled("10:13"))
    [10, 11, 12]
    """
    if not text:
        return range(0)
    found = _FORM.fullmatch(text)
    steps = range(*map(int, found.groups())) if found else range(0)
    if not steps:
        raise ValueError(f"{text!r}; accepted: {ACCEPTED}")
    return steps
