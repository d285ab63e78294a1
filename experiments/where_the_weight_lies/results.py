"""The committed results: `runs.jsonl`, one line a run and split, what is chosen from them, and the
pairs that the runs share, `pairs-TASK.jsonl.gz`."""

import gzip
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.where_the_weight_lies.prompts import Task

_KEY = ("task", "arm", "beta", "learning_rate", "seed", "split")


def scores(records: Sequence[Mapping[str, Any]], task: Task) -> dict[str, Any]:
    """What a samples file comes to.

    Returns:
      `pass`, `finished`: shares of the answers; `tokens`: mean length; `violations`: per 100
      tokens; `samples`: answers a prompt; `passes`: of each prompt, how many passed, in the order
      of the prompts.
    """
    by_prompt: dict[str, int] = {}
    for record in records:
        passed = task.passes(record["response"], record["finish_reason"] == "stop")
        by_prompt[record["id"]] = by_prompt.get(record["id"], 0) + passed
    tokens = sum(len(record["tokens"]) for record in records)
    violations = sum(len(task.violations(record["response"])) for record in records)
    finished = sum(record["finish_reason"] == "stop" for record in records)
    return {
        "pass": round(sum(by_prompt.values()) / len(records), 5),
        "finished": round(finished / len(records), 5),
        "tokens": round(tokens / len(records), 2),
        "violations": round(100 * violations / tokens, 3),
        "samples": len(records) // len(by_prompt),
        "passes": list(by_prompt.values()),
    }


class Results:
    """`runs.jsonl` of a folder; every change is written at once, whole."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._path = folder / "runs.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else ()
        self.rows = {self._key(row): row for row in map(json.loads, lines)}

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row of a run and split, if it is there."""
        return self.rows.get(self._key(key))

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a run's row, or replaces it."""
        self.rows[self._key(row)] = dict(row)
        ordered = sorted(self.rows, key=lambda key: tuple(map(str, key)))
        lines = [json.dumps(self.rows[key]) + "\n" for key in ordered]
        write(self._path, "".join(lines))

    def pairs(self, task: str) -> str | None:
        """The text of the file of pairs that a task's runs trained on, if it is there."""
        path = self._pairs_path(task)
        return gzip.decompress(path.read_bytes()).decode() if path.exists() else None

    def add_pairs(self, task: str, text: str) -> None:
        """Keeps a task's pairs, so that runs elsewhere train on the same."""
        write(self._pairs_path(task), gzip.compress(text.encode(), mtime=0))

    def _pairs_path(self, task: str) -> pathlib.Path:
        return self.folder / f"pairs-{task}.jsonl.gz"

    @staticmethod
    def _key(row: Mapping[str, Any]) -> tuple:
        return tuple(row[name] for name in _KEY)


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file; it appears under its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file; see `write`."""
    write(path, json.dumps(content, indent=1) + "\n")
