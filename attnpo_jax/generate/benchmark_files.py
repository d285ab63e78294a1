"""Samples in the forms that benchmarks' own tools read.

- AlpacaEval: `[{"instruction", "output", "generator", "dataset"}]`, a JSON list;
- MT-Bench: FastChat's answers, a JSON line a question with `choices[].turns`;
- Arena-Hard: v0.1's answers are FastChat's; v2's have the conversation in `messages`.
"""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attnpo_jax.runtime import atomic


def write(
    name: str, samples: pathlib.Path, records: Sequence[Mapping[str, Any]], generator: str
) -> pathlib.Path:
    """Writes one of `FORMS` beside the samples file, of each prompt's first response.

    Args:
      generator: the model's name in the file.

    Returns:
      The file.
    """
    ending, convert = FORMS[name]
    first = [record for record in records if record["sample"] == 0]
    path = samples.with_name(f"{samples.stem}.{name}{ending}")
    atomic.write_atomically(path, convert(first, generator).encode())
    return path


def _alpaca_eval(records: Sequence[Mapping[str, Any]], generator: str) -> str:
    rows = [
        {
            "instruction": record["prompt"][-1]["content"],
            "output": record["response"],
            "generator": generator,
            "dataset": "prompts",
        }
        for record in records
    ]
    return json.dumps(rows, indent=2) + "\n"


def _mt_bench(records: Sequence[Mapping[str, Any]], generator: str) -> str:
    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            yield {
                "question_id": _number(record["id"]),
                "answer_id": f"{generator}-{record['id']}",
                "model_id": generator,
                "choices": [{"index": 0, "turns": [record["response"]]}],
                "tstamp": 0.0,
            }

    return _lines(rows())


def _arena_hard(records: Sequence[Mapping[str, Any]], generator: str) -> str:
    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            answer = {"role": "assistant", "content": {"answer": record["response"]}}
            yield {
                "uid": record["id"],
                "ans_id": f"{generator}-{record['id']}",
                "model": generator,
                "messages": [*record["prompt"], answer],
                "tstamp": 0.0,
                "metadata": {"token_len": len(record["tokens"])},
            }

    return _lines(rows())


def _number(id: str) -> int | str:
    """MT-Bench's questions have numbers."""
    return int(id) if id.isascii() and id.isdecimal() else id


def _lines(rows: Iterator[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FORMS: dict[str, tuple[str, Callable[[Sequence[Mapping[str, Any]], str], str]]] = {
    "alpaca-eval": (".json", _alpaca_eval),
    "mt-bench": (".jsonl", _mt_bench),
    "arena-hard": (".jsonl", _arena_hard),
}
