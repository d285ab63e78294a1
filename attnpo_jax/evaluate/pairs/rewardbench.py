"""RewardBench's sections (Lambert et al. 2024, arXiv 2403.13787): subsets and how they count.

The counts are those of the benchmark's own code, allenai/reward-bench, rewardbench/constants.py. It
counts the 447 pairs of math-prm as 984, as many as the six subsets of code have together, and has
the counts of the two subsets of XSTest exchanged; both are kept, so that scores compare.
"""

from collections.abc import Sequence

import numpy as np

from attnpo_jax.evaluate.evaluator import Figure
from attnpo_jax.runtime import intervals

SECTIONS = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
_ALL = {subset for counts in SECTIONS.values() for subset in counts}


def is_of(subsets: Sequence[str | None]) -> bool:
    """Whether pairs are of RewardBench, by the names of their subsets."""
    return bool(_ALL.intersection(filter(None, subsets)))


def sections(subsets: Sequence[str | None], accuracies: Sequence[float]) -> dict[str, Figure]:
    """The score of each section that has pairs, and of all together.

    A section's score is the mean of its subsets' accuracies, as the benchmark counts them; a subset
    without any pair is left out. The score of all is the mean of the four sections, and there where
    they all are.

    Args:
      subsets: of each pair.
      accuracies: of each pair, 1 where the chosen response has the higher reward.
    """
    names = np.array([subset or "" for subset in subsets], object)
    correct = np.asarray(accuracies, np.float64)
    found = {}
    for section, counts in SECTIONS.items():
        (rows,) = np.nonzero(np.isin(names, list(counts)))
        if len(rows):
            found[section] = _figure(names[rows], correct[rows], {section: counts})
    if len(found) == len(SECTIONS):
        (rows,) = np.nonzero(np.isin(names, list(_ALL)))
        found["score"] = _figure(names[rows], correct[rows], SECTIONS)
    return {f"RewardBench, {name}": figure for name, figure in found.items()}


def _figure(names: np.ndarray, correct: np.ndarray, wanted: dict[str, dict[str, int]]) -> Figure:
    members = [
        [(np.nonzero(names == subset)[0], count) for subset, count in counts.items()]
        for counts in wanted.values()
    ]

    def score(times: np.ndarray) -> float:
        """The mean of the sections, with each pair as often as `times` says."""
        of_sections = []
        for subsets in members:
            there = [(rows, count) for rows, count in subsets if times[rows].sum()]
            if not there:
                return np.nan
            weights = [count for _, count in there]
            rates = [np.average(correct[rows], weights=times[rows]) for rows, _ in there]
            of_sections.append(np.average(rates, weights=weights))
        return float(np.mean(of_sections))

    n = len(correct)
    value = score(np.ones(n))
    if 0 < value < 1:
        low, high = intervals.bootstrap(n, lambda rows: score(np.bincount(rows, minlength=n)))
    else:  # of rows that are all alike there is no spread to resample
        low, high = intervals.mean([value] * n)
    return Figure(value, low, high, n)
