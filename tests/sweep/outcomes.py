"""Made-up outcomes of a sweep's runs."""

from attnpo_jax import config as config_lib
from attnpo_jax.evaluate.evaluator import Figure, Result, figure
from attnpo_jax.evaluate.files import Evaluation
from attnpo_jax.sweep.grid import Point
from attnpo_jax.sweep.running import Outcome


def outcome(group, seed, accuracies, *, checks=None, failed=None):
    config = config_lib.default_config()
    config.seed = seed
    point = Point(f"{group},seed={seed}", group, group, {"seed": str(seed)}, config)
    if failed:
        return Outcome(point, failed=failed)
    rows = [
        {"id": f"p{k}", "accuracy": float(a), "margin": a - 0.25} for k, a in enumerate(accuracies)
    ]
    figures = {name: figure(rows, name) for name in ("accuracy", "margin")}
    figures["hidden"] = figure(rows, "margin", detail=True)
    evaluations = {"pairs": Evaluation("pairs", "step-2", {}, Result(rows, figures))}
    if checks is not None:
        result = Result([], {"checks, strict": Figure(checks)})
        evaluations["checks"] = Evaluation("checks", "step-2", {}, result)
    return Outcome(point, 2, 0.5, evaluations)
