"""Is the trained model better, and how sure are we: evaluations by name.

`evaluate(run, name="checks")` does one; `Evaluator` and `register` make one of your own.
"""

from attnpo_jax.evaluate.evaluator import Evaluator, Figure, Result, figure, find, names, register
from attnpo_jax.evaluate.files import Evaluation, EvaluationMismatch
from attnpo_jax.evaluate.stage import evaluate
from attnpo_jax.evaluate.task import Subject, Task

__all__ = [
    "Evaluation",
    "EvaluationMismatch",
    "Evaluator",
    "Figure",
    "Result",
    "Subject",
    "Task",
    "evaluate",
    "figure",
    "find",
    "names",
    "register",
]
