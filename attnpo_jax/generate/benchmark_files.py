"""Samples in the forms that benchmarks' own tools read.

- AlpacaEval: `[{"instruction", "output", "generator", "dataset"}]`, a JSON list;
- MT-Bench: FastChat's answers, a JSON line a question with `choices[].turns`;
- Arena-Hard: answers with the conversation in `messages`; v0.1 had FastChat's layout at first, with
  an object a turn.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    return _lines(
        mt_bench_answer(_number(record["id"]), [record["response"]], generator)
        for record in records
    )


def mt_bench_answer(id: int | str, turns: Sequence[str], generator: str) -> dict[str, Any]:
    """FastChat's row of an answer, a text a turn."""
    return {
        "question_id": id,
        "answer_id": f"{generator}-{id}",
        "model_id": generator,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": 0.0,
    }


def _arena_hard(records: Sequence[Mapping[str, Any]], generator: str) -> str:
    return _lines(arena_hard_answer(record, generator) for record in records)


def arena_hard_answer(record: Mapping[str, Any], generator: str) -> dict[str, Any]:
    """Arena-Hard's row of an answer."""
    answer = {"role": "assistant", "content": {"answer": record["response"]}}
    return {
        "uid": record["id"],
        "ans_id": f"{generator}-{record['id']}",
        "model": generator,
        "messages": [*record["prompt"], answer],
        "tstamp": 0.0,
        "metadata": {"token_len": len(record["tokens"])},
    }


def arena_hard_v01_answer(record: Mapping[str, Any], generator: str) -> dict[str, Any]:
    """The row of an answer in the layout that Arena-Hard v0.1 had at first."""
    turn = {"content": record["response"], "token_len": len(record["tokens"])}
    return {
        "question_id": record["id"],
        "answer_id": f"{generator}-{record['id']}",
        "model_id": generator,
        "choices": [{"index": 0, "turns": [turn]}],
        "tstamp": 0.0,
    }


def _number(id: str) -> int | str:
    """MT-Bench's questions have numbers."""
    return int(id) if id.isascii() and id.isdecimal() else id


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FORMS: dict[str, tuple[str, Callable[[Sequence[Mapping[str, Any]], str], str]]] = {
    "alpaca-eval": (".json", _alpaca_eval),
    "mt-bench": (".jsonl", _mt_bench),
    "arena-hard": (".jsonl", _arena_hard),
}
