"""Where each arm's weights lie in the prepared pairs, before anything is trained."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from attnpo_jax import Prepared, ResponseTokens, Run, weighting
from experiments.where_the_weight_lies import arms as arms_lib


def places(workdir: pathlib.Path, task: str) -> dict[str, dict[str, float]]:
    """Of each arm, over the rejected responses of all pairs.

    Returns:
      By arm: `on_violations`, the mean weight of violating tokens (1 where weights are uniform);
      `share`, of the weight that lies on them; `effective`, the share of tokens that as
      concentrated uniform weights would lie on, (sum w)^2 / (n sum w^2).
    """
    pool = workdir / task / "pool"
    found = {}
    for arm in arms_lib.ARMS:
        config = arms_lib.arm_config(pool / "pairs.jsonl", arm, 0.1, 1e-5, 0)
        run = Run.resolve(config, pool)
        section = dict(run.config.weighting.items())
        weigh = weighting.bind(section.pop("name"), section)
        weigh = weighting.shaped(weigh, normalize=config.shaping.normalize)
        # All arms' columns, whatever this one reads.
        data = run.open_prepared("train", reads=("judge", "reference_logps"))
        figures = [_of_pair(weigh, row, data) for row in data]
        found[arm] = {
            name: round(float(np.mean([one[name] for one in figures])), 4) for name in figures[0]
        }
    return found


def _of_pair(weigh: Any, row: Mapping[str, Any], data: Prepared) -> dict[str, float]:
    """The figures of a pair's rejected response."""
    ids = {side: np.asarray(row[f"{side}_ids"]) for side in ("chosen", "rejected")}
    T, text = len(ids["rejected"]), row["rejected_text_length"]
    judge_2ST = np.pad(np.asarray(row["judge_rejected"]), ((0, 0), (0, 0), (0, T - text)))
    ready_KT = np.pad(np.asarray(row["ready_rejected"]), ((0, 0), (0, T - text)))
    response = ResponseTokens.of(
        np.ones((1, T), bool),
        text_mask_BT=np.arange(T)[None] < text,
        judge_B2ST=judge_2ST[None],
        is_chosen=[False],
        source_layers=data.source_layers,
        num_layers=data.num_layers,
        ready_BKT=ready_KT[None],
        weight_columns=data.weight_columns,
        tokens_BT=ids["rejected"][None],
        partner_tokens_BT=ids["chosen"][None],
        partner_length_B=[len(ids["chosen"])],
    )
    w_T = np.asarray(weigh(response)[0], np.float64)
    violating_T = ready_KT[data.weight_columns.index("oracle")] > 0
    return {
        "on_violations": float(w_T[violating_T].mean()),
        "share": float(w_T[violating_T].sum() / w_T.sum()),
        "effective": float(w_T.sum() ** 2 / (T * (w_T**2).sum())),
    }


def show(found: Mapping[str, Mapping[str, float]]) -> None:
    """Prints them as a table in Markdown."""
    print("| arm | weight of a violating token | share of the weight | effective share of tokens |")
    print("|---|---|---|---|")
    for arm, one in found.items():
        print(
            f"| {arm} | {one['on_violations']:.2f} | {one['share']:.3f} | {one['effective']:.3f} |"
        )
