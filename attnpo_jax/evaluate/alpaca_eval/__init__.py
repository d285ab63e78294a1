"""AlpacaEval 2: win rates against a baseline, as its package has them, plain and length-controlled.

`score` makes figures of annotations, and `annotate` annotations of outputs; both read and write the
package's files.
"""

import pathlib
from typing import TYPE_CHECKING, Any

from attnpo_jax.data.prompts import Prompt
from attnpo_jax.evaluate import needs, others_files
from attnpo_jax.evaluate.alpaca_eval import files
from attnpo_jax.evaluate.alpaca_eval.length_control import LengthData
from attnpo_jax.evaluate.alpaca_eval.score import score
from attnpo_jax.evaluate.evaluator import Evaluator, Result
from attnpo_jax.parallel import processes

if TYPE_CHECKING:
    from attnpo_jax.evaluate.task import Task

__all__ = ["EVALUATOR", "LengthData", "score"]

_REFERENCE = "the baseline's outputs, a JSON list of instruction, output and generator"
_PROMPT = "the judge's prompt, alpaca_eval_clf.txt of the package"


def run(task: "Task") -> Result:
    """Scores the annotations that are named, or makes them first."""
    length_file = needs.optional_path(task, "length_data")
    length_data = None if length_file is None else LengthData.read(length_file)
    named = needs.optional_path(task, "annotations")
    if named is not None:
        return score(files.read_annotations(named), length_data)
    annotations = _annotations(task)
    return score(annotations, length_data) if annotations else Result([], {})


def _annotations(task: "Task") -> list[dict[str, Any]]:
    """Annotations of the outputs that are named or sampled; of all processes, in the first one."""
    from attnpo_jax.evaluate.alpaca_eval.annotate import annotate

    # All that may be missing is asked for before anything is sampled.
    prompt = files.JudgePrompt(needs.path(task, "prompt", _PROMPT))
    baseline = files.read_outputs(needs.path(task, "reference", _REFERENCE))
    folder = needs.folder(task) / task.model
    judge = needs.judge(task)
    named = needs.optional_path(task, "outputs")
    outputs = _sampled(task, baseline, folder) if named is None else files.read_outputs(named)
    if not processes.is_first():
        return []
    annotations = annotate(
        files.joined(baseline, outputs, task.model),
        prompt,
        judge,
        annotator=task.section.annotator or judge.model,
        seed=task.section.seed,
    )
    others_files.write_list(folder / "annotations.json", annotations)
    return annotations


def _sampled(
    task: "Task", baseline: list[dict[str, Any]], folder: pathlib.Path
) -> list[dict[str, Any]]:
    """The model's outputs; the first process writes them as the package has them."""
    ids = files.ids([row["instruction"] for row in baseline])
    asked = zip(ids, baseline, strict=True)
    prompts = [Prompt(id, ({"role": "user", "content": row["instruction"]},)) for id, row in asked]
    said = {record["id"]: record["response"] for record in task.responses(prompts, samples=1)}
    outputs = [
        {
            "instruction": row["instruction"],
            "output": said[id],
            "generator": task.model,
            "dataset": row.get("dataset"),
        }
        for id, row in zip(ids, baseline, strict=True)
        if id in said
    ]
    if processes.is_first():
        others_files.write_list(folder / "model_outputs.json", outputs)
    return outputs


EVALUATOR = Evaluator(
    "alpaca-eval",
    run,
    of_files=lambda section: bool(section.annotations or section.outputs),
    reads=("generate.", "model.", "evaluate.judge.model"),
)
