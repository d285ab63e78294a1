"""The sections of a page: of one run, and of several side by side."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import attnpo_jax
from attnpo_jax import weighting
from attnpo_jax.report import curves, facts, page, probed, results, runs, token_data
from attnpo_jax.report.blocks import Paragraph, Section, Tokens
from attnpo_jax.report.material import Material
from attnpo_jax.report.numbers import PairNumbers, Policy, load_policy, take
from attnpo_jax.report.runs import Member
from attnpo_jax.report.shown import Shown, choose
from attnpo_jax.report.views import View, views_of

# What the view of tokens takes in the page beside its data.
_MARGIN = 10_000
# Sections that the view of tokens stands before.
_AFTER_TOKENS = ("probe", "curves", "run")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs that a page shows token by token.

    Attributes:
      material: the run's.
      shown: the pairs.
      views: their weightings.
      numbers: of each pair.
      policy: the trained model.
    """

    material: Material
    shown: Shown
    views: Sequence[View]
    numbers: Sequence[PairNumbers]
    policy: Policy


def of_run(material: Material, most: int, made_of: str) -> bytes:
    """The page of a run.

    Args:
      material: the run's.
      most: pairs that are shown token by token.
      made_of: see `material.digest`.
    """
    run = material.run
    pairs = _pairs(material, most)
    sections = [
        Section("held-out", "Held-out pairs", _held_out(material, pairs)),
        Section("evaluations", "Evaluations", results.evaluations(material.evaluations)),
        Section("answers", "Answers before and after", _answers(material)),
        Section("probe", "Where the judge looks: the probe", _probe(material)),
        Section("curves", "Curves", curves.blocks({"": [material.lines]})),
        Section("run", "What was run", _facts(material)),
    ]
    title = f"attnpo report: {run.workdir.resolve().name}"
    summary = facts.summary(run.config, material.entries, material.step)
    return _rendered(title, summary, sections, pairs, material.notes, made_of)


def of_runs(members: Sequence[Member], most: int, made_of: str) -> bytes:
    """The page of several runs; tokens are those of the first whose pairs are there."""
    shows = next((one.material for one in members if one.material.splits), members[0].material)
    pairs = _pairs(shows, most)
    groups: dict[str, list[curves.Lines]] = {}
    for member in members:
        groups.setdefault(member.group, []).append(member.material.lines)
    sections = [
        Section("comparison", "Comparison", runs.blocks(members)),
        Section("differences", "What sets them apart", [runs.what_differs(members)]),
        Section("curves", "Curves", curves.blocks(groups)),
        Section("run", "What was run", [runs.table_of_runs(members), *_facts(shows)]),
    ]
    names = [member.source.name for member in members]
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    summary = f"{len(members)} runs in {len(groups)} groups: {'; '.join(groups)}."
    notes = [f"{one.source.name}: {note}" for one in members for note in one.material.notes]
    return _rendered(f"attnpo report: {listed}", summary, sections, pairs, notes, made_of)


def _rendered(
    title: str,
    summary: str,
    sections: Sequence[Section],
    pairs: Pairs | None,
    notes: list[str],
    made_of: str,
) -> bytes:
    now = datetime.datetime.now().astimezone()
    made = f"Made by attnpo_jax {attnpo_jax.__version__} on {now:%Y-%m-%d %H:%M %Z}."

    def render(sections: Sequence[Section]) -> bytes:
        noted = [Paragraph(note) for note in dict.fromkeys(notes)]
        every = [*sections, Section("notes", "What could not be shown", noted)]
        some = [section for section in every if section.blocks]
        return page.render(title, summary, some, made=made, made_of=made_of)

    if pairs is None:
        return render(sections)
    room = page.MOST_BYTES - _MARGIN - len(render(sections))
    tokens = Section("tokens", "Tokens", _tokens(pairs, room))
    before = [section.id in _AFTER_TOKENS for section in sections].index(True)
    return render([*sections[:before], tokens, *sections[before:]])


def _pairs(material: Material, most: int) -> Pairs | None:
    """The pairs to show, no more than a page may have room for; None where there are none."""
    same = Shown.alike(material.splits)
    if not same or not most:
        return None
    rows = choose({split: len(dataset) for split, dataset in same.items()}, most)
    shown = Shown.of(same, rows)
    sizes = token_data.estimate(shown, len(weighting.names()))
    shown = shown.some(token_data.fitting(sizes, page.MOST_BYTES))
    policy = load_policy(material.run)
    views, numbers = take(material.run, shown, views_of(material.run.config, shown), policy)
    return Pairs(material, shown, views, numbers, policy)


def _held_out(material: Material, pairs: Pairs | None) -> list[Any]:
    held_out = []
    if pairs is not None:
        both = zip(pairs.shown.places, pairs.numbers, strict=True)
        held_out = [one for (split, _), one in both if split == "eval"]
    scored = results.scored(held_out, "" if pairs is None else pairs.policy.name)
    everything = scored is not None and len(held_out) == len(material.splits["eval"])
    logged = None if everything else results.logged(material.lines)
    tables = [table for table in (logged, scored) if table is not None]
    return [*tables, Paragraph(results.TIES)] if tables else []


def _answers(material: Material) -> list[Any]:
    found, notes = results.answers(material.run.workdir)
    material.notes += notes
    return list(found)


def _probe(material: Material) -> list[Any]:
    with material.noting():
        return probed.blocks(material.run.workdir)
    return []


def _tokens(pairs: Pairs, room: int) -> list[Any]:
    material, policy = pairs.material, pairs.policy
    data = token_data.page_data(
        pairs.shown, pairs.views, pairs.numbers, material.token_texts(), policy.name, room
    )
    total = sum(len(dataset) for dataset in material.splits.values())
    text = (
        f"{len(data['pairs'])} of {total} prepared pairs of {material.run.workdir.resolve().name}"
    )
    text += ", spread evenly over the held-out and training ones. "
    text += (
        f"Log-probs of the trained model are of {policy.name}."
        if policy.sampled
        else f"The trained model's log-probs are not shown: {policy.missing}."
    )
    told = [Paragraph(text)]
    if data["opening"] or data["closing"]:
        ends = f"“{data['opening']}” and end with “{data['closing']}”"
        told.append(Paragraph(f"Most prompts begin with {ends}, which is left out below."))
    return [*told, Tokens(data)]


def _facts(material: Material) -> list[Any]:
    found = [
        facts.settings(material.run.config),
        *facts.data(material.splits),
        facts.stages(material.entries),
        facts.versions(material.splits, material.entries),
    ]
    return [block for block in found if block is not None]
