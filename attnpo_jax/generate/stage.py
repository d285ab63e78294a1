"""`attnpo generate`: responses to prompts, as a samples file; or a chat in the terminal."""

import contextlib
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from attnpo_jax.data import prompts as prompts_lib
from attnpo_jax.data.prompts import Prompt
from attnpo_jax.generate import benchmark_files, chat
from attnpo_jax.generate import model as models
from attnpo_jax.generate.respond import respond
from attnpo_jax.parallel import processes
from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.errors import UsageError, UserError
from attnpo_jax.runtime.printable import say
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.sampling.requests import Refused

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)


class PromptsRefused(UserError):
    """Some prompts were not answered; the others were."""


def generate(
    run: "Run",
    *,
    model: str | None = None,
    prompts: str | None = None,
    name: str | None = None,
    out: str | os.PathLike | None = None,
    also: str | None = None,
    interactive: bool = False,
    console: Console | None = None,
) -> pathlib.Path | None:
    """Samples responses and writes them as JSON lines, which an interrupted run continues.

    Of several processes each answers its part of the prompts, on its own devices; or all answer the
    same together, where `prepare.devices` or the model's size asks for that.

    Args:
      run: the run; its config's section `generate` says how.
      model: see `generate.model.load`.
      prompts: a source, see `data.prompts.load_prompts`; None for the config's held-out pairs.
      name: of the samples, in the workdir's `samples`; None for the model's.
      out: the samples file, in place of that.
      also: files for benchmarks' own tools to write beside it, of `benchmark_files.FORMS`, with
        commas between.
      interactive: a chat in the terminal instead.
      console: where figures go; None for standard output.

    Returns:
      The samples file.

    Raises:
      UsageError: neither `out` nor a workdir says where samples go; `also` is no form.
      SamplesMismatch: there are other samples of that name.
      PromptsRefused: some prompts could not be answered; the others are.
      FileNotFoundError, UserError: there is no such model or source.
      Preempted: SIGTERM or Ctrl-C came; finished responses are kept.
    """
    console = console or Console()
    if interactive:
        chat.chat(run, model, console)
        return None
    forms = _forms(also)
    if out is None and run.workdir is None:
        raise UsageError("generate needs --workdir=DIR or --out=FILE.jsonl, for the samples")
    loaded, refused = _load_prompts(run, prompts)
    with run.writing() if out is None else contextlib.nullcontext():
        sampled = models.load(run, model)
        path = _path(run, model, name, out, sampled)
        records, not_answered = respond(run, sampled, loaded, path)
        refused += not_answered
        if processes.is_first():
            rows = [{"id": one.id, "reason": one.reason} for one in refused]
            atomic.write_json_lines(_refused_path(path), rows)
            if records:
                say(console, _summary(path, records))
            for form in forms if records else ():
                written = benchmark_files.write(form, path, records, sampled.name)
                say(console, f"{written}: for {form}")
    processes.barrier("generate: written")
    if refused:
        raise PromptsRefused(
            f"{len(refused)} prompts were not answered, the first one {refused[0].id}: "
            f"{refused[0].reason}; all are listed in {_refused_path(path)}"
        )
    return path


def _load_prompts(run: "Run", source: str | None) -> tuple[list[Prompt], list[Refused]]:
    if source is not None:
        most = run.config.data.max_example_bytes
        good, bad = prompts_lib.load_prompts(source, run.columns, most)
        named = [bad_one.id or f"{bad_one.file}, example {bad_one.number}" for bad_one in bad]
        return good, [Refused(id, bad_one.reason) for id, bad_one in zip(named, bad, strict=True)]
    if "eval" not in run.splits:
        raise UsageError("generate needs --prompts=FILE, since config.data.eval names no pairs")
    return run.held_out_prompts(), []


def _path(
    run: "Run",
    model: str | None,
    name: str | None,
    out: str | os.PathLike | None,
    sampled: SampledModel,
) -> pathlib.Path:
    if out is not None:
        return pathlib.Path(out).expanduser()
    if name is None:
        name = pathlib.PurePath(sampled.name).name
        name = models.BASE if model == models.BASE else name
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise UsageError(f"--name={name}; accepted: letters, digits, and . _ + - between them")
    return run.workdir / "samples" / f"{name}.jsonl"


def _refused_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.stem}.refused.jsonl")


def _summary(path: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> str:
    tokens = [len(record["tokens"]) for record in records]
    stopped = sum(record["finish_reason"] == "stop" for record in records)
    mean = sum(tokens) / len(tokens)
    return (
        f"{path}: {len(records)} responses, {sum(tokens)} tokens (mean {mean:.1f}, longest "
        f"{max(tokens)}), {stopped} ended by themselves, {len(records) - stopped} had no more room"
    )


def _forms(also: str | None) -> list[str]:
    forms = [form.strip() for form in also.split(",")] if also else []
    for form in forms:
        if form not in benchmark_files.FORMS:
            accepted = ", ".join(benchmark_files.FORMS)
            raise UsageError(f"--also={form}; accepted: {accepted}, with commas between")
    return forms
