"""What `prepared.json` and `plan.json` say, and whether it is what a run wants."""

import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import datasets

from attnpo_jax.data import shards
from attnpo_jax.runtime import nested
from attnpo_jax.runtime.errors import UserError

FORMAT = 1
PLAN, METADATA = "plan.json", "prepared.json"
RECORDED_VERSIONS = ("datasets", "flax", "jax", "numpy", "pyarrow", "tokenizers", "transformers")


class PreparedMismatch(UserError):
    """The folder holds a dataset that was prepared from something else.

    Attributes:
        differences: component name (nested ones joined by dots) -> (value on disk, value wanted).
        path: the folder.

    Args:
        named: turns a component's name into what a reader knows it by.
    """

    def __init__(
        self,
        path: pathlib.Path,
        differences: dict[str, tuple[Any, Any]],
        named: Callable[[str], str] = str,
    ):
        lines = [
            f"  {named(name)}: on disk {_short(on_disk)}, config {_short(wanted)}"
            for name, (on_disk, wanted) in differences.items()
        ]
        super().__init__(
            f"{path} was prepared with other settings:\n"
            + "\n".join(lines)
            + "\nAccepted: the settings on disk, another workdir, or this folder deleted."
        )
        self.path, self.differences = path, differences


def fingerprint(components: Mapping[str, Any]) -> str:
    """sha256 (hex) of the components as canonical JSON; tuples count as lists."""
    text = json.dumps(
        canonical(components), sort_keys=True, separators=(",", ":"), ensure_ascii=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


def features(components: Mapping[str, Any]) -> datasets.Features:
    return shards.features(
        len(components["source_layers"]),
        len(components.get("weight_columns", ())),
        verdict=(components.get("judge") or {}).get("verdict", True),
    )


def check_components(
    path: pathlib.Path, components: Mapping[str, Any], num_rows: int | None = None
) -> None:
    wanted = {"format": FORMAT, **canonical(components)}
    if num_rows is not None:
        wanted["num_rows"] = num_rows
    for name in (METADATA, PLAN):
        found = read_json(path / name)
        if found is None:
            continue
        on_disk = {"format": found["format"], **found["components"]}
        if num_rows is not None:
            on_disk["num_rows"] = found.get("planned_rows", found["num_rows"])
        found_differences = differences(on_disk, wanted)
        if found_differences:
            raise PreparedMismatch(path, found_differences)


def differences(
    on_disk: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Components that differ in JSON: name, nested ones joined by dots -> (on disk, wanted)."""
    return nested.differences(canonical(on_disk), canonical(wanted))


def canonical(value: Any) -> Any:
    """The value as it comes back from JSON (tuples as lists, keys as strings)."""
    return json.loads(json.dumps(value, allow_nan=False))


def _short(value: Any, limit: int = 100) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def read_json(file: pathlib.Path) -> dict[str, Any] | None:
    """The file's content, or None if there is no such file."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file}: not readable ({error}); delete it and prepare again") from error


def file_digest(file: pathlib.Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("attnpo_jax", *RECORDED_VERSIONS)}
