"""`attnpo generate`: responses to prompts, as a samples file; or a chat in the terminal."""

import contextlib
import logging
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax.data import prompts as prompts_lib
from attnpo_jax.data.prompts import Prompt
from attnpo_jax.generate import benchmark_files, chat
from attnpo_jax.generate import model as models
from attnpo_jax.generate.api import engine_for
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.runtime import atomic, schema
from attnpo_jax.runtime.errors import Preempted, UsageError, UserError
from attnpo_jax.runtime.printable import say
from attnpo_jax.runtime.progress import CountProgress
from attnpo_jax.sampling.engine import Engine
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.sampling.requests import Refused, requests_of
from attnpo_jax.sampling.responses import Request
from attnpo_jax.sampling.samples import Samples

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

# What processes tell each other: ids and numbers of responses; ids of prompts and reasons.
_KEYS = schema.Listed(schema.Row((schema.Text(), schema.Whole())))
_REFUSED = schema.Listed(schema.Row((schema.Text(), schema.Text())))


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
        section = run.config.generate
        requests, length, too_long = requests_of(
            sampled,
            loaded,
            sampled.settings(**config_lib.sampling(section)),
            samples=section.samples,
            max_length=section.max_length,
            long_prompts=section.long_prompts,
        )
        path = _path(run, model, name, out, sampled)
        refused += too_long
        failed = _answer(run, sampled, loaded, requests, length, path)
        refused += failed
        if processes.is_first():
            _finish(path, sampled, loaded, requests, refused, forms, console)
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


def _answer(
    run: "Run",
    sampled: SampledModel,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    length: int,
    path: pathlib.Path,
) -> list[Refused]:
    """Samples what is not there yet; the prompts whose logits were no numbers."""
    team = processes.team()
    if sampled.together:
        mine, part = requests, 0
    else:
        places = range(team.index, len(requests), team.count)
        mine, part = [requests[i] for i in places], team.index
    samples = Samples(path, sampled.name, prompts, part)
    # Looked at by one for all: a file system may show others less.
    there = [list(key) for key in samples.done(requests)]
    done = {tuple(key) for key in team.exchange(there, _KEYS)[0]}
    left = [request for request in mine if (request.id, request.sample) not in done]
    failed: list[Refused] = []
    stopped = False
    if left:
        # As if none were there yet, so that what is left comes out as it would have.
        slots = min(run.config.generate.slots, len(requests))
        engine = engine_for(sampled, run.config, length=length, slots=slots, steady=True)
        _LOG.info(
            "%d responses, %d at a time; the KV cache takes %.2f GB (%d tokens a slot)",
            len(left),
            engine.cache_shape.slots,
            engine.cache_shape.nbytes / 1e9,
            length,
        )
        writes = not sampled.together or processes.is_first()
        bar = run.config.log.progress and processes.is_first()
        kept = samples if writes else None
        failed, stopped = _sample(engine, left, requests, kept, bar, sampled.together)
    processes.barrier("generate: responses written")
    everyones = team.exchange([[one.id, one.reason] for one in failed], _REFUSED)
    failed = [Refused(*said) for of_one in everyones for said in of_one]
    if preemption.agreed(stopped):
        raise Preempted(
            f"generating was told to stop; the responses that are finished are kept beside {path}, "
            "and the same command goes on"
        )
    return list(dict.fromkeys(failed))


def _sample(
    engine: Engine,
    requests: Sequence[Request],
    everyone: Sequence[Request],
    samples: Samples | None,
    bar: bool,
    together: bool,
) -> tuple[list[Refused], bool]:
    """Runs the engine on those of all requests that are left; the prompts that failed, and whether
    it was told to stop.
    """
    failed: list[Refused] = []
    by_key = {(request.id, request.sample): request for request in requests}
    engine.submit(requests, everyone)
    total = len(requests)
    with (
        preemption.watch() as noticed,
        CountProgress("generate", total, "responses", bar=bar) as progress,
        contextlib.closing(samples) if samples is not None else contextlib.nullcontext(),
    ):

        def told() -> bool:
            # Those that work together must leave off together.
            return preemption.agreed(noticed()) if together else noticed()

        tokens, start = 0, time.monotonic()
        while engine.running or engine.waiting:
            if told():
                return failed, True
            finished = 0
            for update in engine.step():
                tokens += len(update.tokens)
                response = update.response
                if response is None:
                    continue
                if response.finish_reason == "error":
                    reason = "the model's logits are no numbers (NaN or infinite)"
                    failed.append(Refused(response.id, reason))
                elif samples is not None:
                    samples.add(by_key[response.id, response.sample], response)
                finished += 1
            rate = tokens / max(time.monotonic() - start, 1e-9)
            under_way = f"{engine.running} running, {engine.waiting} waiting"
            progress.add(finished, f"{rate:.1f} tokens/s, {under_way}")
        return failed, told()


def _finish(
    path: pathlib.Path,
    sampled: SampledModel,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    refused: Sequence[Refused],
    forms: Sequence[str],
    console: Console,
) -> None:
    """The files as they are to be, and what is told of them."""
    out_of = {one.id for one in refused}
    answered = [request for request in requests if request.id not in out_of]
    records = Samples(path, sampled.name, prompts).finish(answered) if answered else []
    rows = [{"id": one.id, "reason": one.reason} for one in refused]
    atomic.write_json_lines(_refused_path(path), rows)
    if not records:
        return
    say(console, _summary(path, records))
    for form in forms:
        written = benchmark_files.write(form, path, records, sampled.name)
        say(console, f"{written}: for {form}")


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
