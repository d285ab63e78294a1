"""Nested mappings: flattened to dotted names, and compared."""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import config_dict


def flatten(
    values: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()
) -> dict[str, Any]:
    """All values by dotted name, lists as tuples.

    Args:
      values: mappings, nested.
      prefix: of all names.
      whole: dotted names of values that are kept as they are, mappings or not.

    >>> flatten({"train": {"steps": 3}, "layers": [0, -1]})
    {'train.steps': 3, 'layers': (0, -1)}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if prefix + key in whole:
            # A copied config has ConfigDicts for dicts, which are no Mappings.
            is_config = isinstance(value, config_dict.ConfigDict)
            flat[prefix + key] = value.to_dict() if is_config else value
        elif isinstance(value, (config_dict.ConfigDict, Mapping)):
            flat.update(flatten(value, f"{prefix}{key}.", whole))
        else:
            flat[prefix + key] = as_tuples(value)
    return flat


def as_tuples(value: Any) -> Any:
    """The value with tuples for all lists in it."""
    return tuple(map(as_tuples, value)) if isinstance(value, (list, tuple)) else value


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], absent: Any = None, prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """What differs, by dotted name: (value in `old`, value in `new`).

    A mapping that only one side has is one difference; a list is no other than the same tuple.

    Args:
      old, new: mappings, nested or flat.
      absent: stands for a value that one side does not have.
      prefix: of all names.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})
    {'a.c': (2, 3), 'd': (None, 4)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = old.get(name, absent), new.get(name, absent)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, absent, f"{prefix}{name}.")
        elif as_tuples(a) != as_tuples(b) or (name in old) != (name in new):
            found[f"{prefix}{name}"] = (a, b)
    return found
