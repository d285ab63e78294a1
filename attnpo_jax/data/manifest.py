"""What `prepared.json` and `plan.json` say, and whether it is what a run wants."""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets

from attnpo_jax.data import shards
from attnpo_jax.data.pair import NUMBERS
from attnpo_jax.runtime import json_files, nested, schema
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.schema import Choice, Flag, Listed, Mapped, Maybe, Table, Text, Whole

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


def groups(components: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns, by `shards.GROUPS`, that a dataset of these components has."""
    judged = ("judge",) if components["source_layers"] else ()
    return tuple(components.get("columns", (*judged, "reference_logps")))


def identity(components: Mapping[str, Any]) -> dict[str, Any]:
    """The components, but for which columns there are."""
    return {name: value for name, value in components.items() if name != "columns"}


def with_groups(components: Mapping[str, Any], there: Sequence[str]) -> dict[str, Any]:
    """The components of a dataset with these columns; the usual ones are not spelled out."""
    plain = identity(components)
    usual = groups(plain) == tuple(there)
    return plain if usual else {**plain, "columns": list(there)}


def features(components: Mapping[str, Any]) -> datasets.Features:
    return shards.features(
        len(components["source_layers"]),
        len(components.get("weight_columns", ())),
        verdict=(components.get("judge") or {}).get("verdict", True),
        numbers=[
            name for name in NUMBERS if name in (components.get("data") or {}).get("fields", {})
        ],
        groups=groups(components),
        alone="of" in components,
        whole_responses=whole_responses(components),
        own_prompts=own_prompts(components),
    )


def whole_responses(components: Mapping[str, Any]) -> bool:
    """Whether the judge columns come with figures of whole responses."""
    return (components.get("judge") or {}).get("whole_responses", False)


def own_prompts(components: Mapping[str, Any]) -> bool:
    """Whether a pair's responses may have prompts of their own."""
    return components.get("truncation") == "keep_end"


def check_components(
    path: pathlib.Path, components: Mapping[str, Any], num_rows: int | None = None
) -> None:
    wanted = {"format": FORMAT, **canonical(components)}
    if num_rows is not None:
        wanted["num_rows"] = num_rows
    for name in (METADATA, PLAN):
        found = read(path / name)
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


@dataclasses.dataclass(frozen=True)
class _Source:
    """A form: the number of a layer, the name of a head, or attention rollout."""

    def check(self, value: Any) -> None:
        name = Text(r"[0-9]+:[0-9]+|rollout", "a layer, a head as '23:4', or 'rollout'")
        (name if isinstance(value, str) else Whole()).check(value)


_DIGEST = Text("[0-9a-f]{64}", "64 hexadecimal digits")
_COMPONENTS = Table(
    {"source_layers": Listed(_Source()), "num_layers": Whole(1)},
    {
        "weight_columns": Listed(Text()),
        "columns": Listed(Choice(tuple(shards.GROUPS))),
        "of": _DIGEST,
        "judge": Maybe(Table({}, {"verdict": Flag(), "whole_responses": Flag()}, open=True)),
        "data": Table({}, {"digest": Text(), "fields": Table({}, {}, open=True)}, open=True),
    },
    open=True,
)
_SHARD = Table(
    {
        # A name, and no path that leads elsewhere.
        "file": Text(r"data-\d{5,9}-of-\d{5,9}\.arrow", "the name of a shard"),
        "rows": Whole(),
        "bytes": Whole(),
        "sha256": _DIGEST,
    }
)
_CHECK = {"check": _DIGEST}  # which files of old lack
_PLAN_FORM = Table(
    {
        "format": Whole(),
        "components": _COMPONENTS,
        "num_rows": Whole(1),
        "rows_per_shard": Whole(1),
    },
    _CHECK,
)
_METADATA_FORM = Table(
    {
        "format": Whole(),
        "fingerprint": _DIGEST,
        "components": _COMPONENTS,
        "num_rows": Whole(),
        "rows_per_shard": Whole(1),
        "shards": Listed(_SHARD),
        "counts": Mapped(Whole()),
        "versions": Mapped(Text()),
    },
    {"planned_rows": Whole(1), **_CHECK},
)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a digest of it under `check`."""
    return {**content, "check": fingerprint(content)}


def read(file: pathlib.Path) -> dict[str, Any] | None:
    """What a `prepared.json` or `plan.json` says, checked; None if there is no such file.

    Raises:
      UserError: it is damaged, or of another format.
    """
    if not file.is_file():
        return None
    if file.name == PLAN:
        form, remedy = _PLAN_FORM, f"delete the folder {file.parent} and run prepare again"
    else:
        form, remedy = _METADATA_FORM, "delete it and run prepare again, which keeps whole shards"
    of_format = Table({"format": Whole()}, open=True)
    content = json_files.read(file, of_format, remedy)
    if content["format"] != FORMAT:
        raise UserError(f"{file}: format {content['format']}; accepted: {FORMAT}")
    return json_files.read(file, _Intact(form), remedy)


@dataclasses.dataclass(frozen=True)
class _Intact:
    """A form: what `sealed` made of another form, or of old, before there were digests."""

    form: schema.Form

    def check(self, value: Any) -> None:
        self.form.check(value)
        content = {key: one for key, one in value.items() if key != "check"}
        if value.get("check", fingerprint(content)) != fingerprint(content):
            raise schema.SchemaError("holds something else than was written")
        if "fingerprint" in value and value["fingerprint"] != fingerprint(value["components"]):
            raise schema.SchemaError("is not that of the components", "fingerprint")
        if "shards" in value:
            rows = sum(shard["rows"] for shard in value["shards"])
            if rows != value["num_rows"]:
                raise schema.SchemaError(
                    f"is {value['num_rows']}, of the shards {rows}", "num_rows"
                )


_BAD_ROWS = Listed(Table({"id": Text()}, open=True))


def refused_ids(path: pathlib.Path) -> set[str]:
    """The ids of the pairs that a finished dataset lacks, since they turned out bad."""
    of_shards = [read_bad_rows(file, "the shard") for file in sorted(path.glob("bad-*.jsonl"))]
    return {row["id"] for rows in of_shards for row in rows}


def read_bad_rows(file: pathlib.Path, shard: str) -> list[dict[str, Any]]:
    """The records of the rows that a shard lacks.

    Raises:
      UserError: the file is damaged.
    """
    lines = file.read_bytes().splitlines()
    try:
        found = [json_files.loads(line) for line in lines]
        schema.check(found, _BAD_ROWS)
    except ValueError as error:
        remedy = f"delete {shard} beside it and run prepare again"
        raise UserError(f"{file}: damaged ({error}); {remedy}") from error
    return found


def file_digest(file: pathlib.Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("attnpo_jax", *RECORDED_VERSIONS)}
