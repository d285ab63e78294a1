"""Responses to prompts into a samples file, on the devices of one process or several; resumes."""

import contextlib
import logging
import pathlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnpo_jax import config as config_lib
from attnpo_jax.data.prompts import Prompt
from attnpo_jax.generate.api import engine_for
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.runtime import schema
from attnpo_jax.runtime.errors import Preempted
from attnpo_jax.runtime.progress import CountProgress
from attnpo_jax.sampling.engine import Engine
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.sampling.requests import Refused, requests_of
from attnpo_jax.sampling.responses import Request
from attnpo_jax.sampling.samples import Samples, read

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

# What processes tell each other: ids and numbers of responses; ids of prompts and reasons.
_KEYS = schema.Listed(schema.Row((schema.Text(), schema.Whole())))
_REFUSED = schema.Listed(schema.Row((schema.Text(), schema.Text())))


def respond(
    run: "Run",
    sampled: SampledModel,
    prompts: Sequence[Prompt],
    path: pathlib.Path,
    *,
    samples: int | None = None,
    **settings: Any,
) -> tuple[list[dict[str, Any]], list[Refused]]:
    """Has a model answer prompts; what its samples file has already is not sampled again.

    Args:
      run: whose config's section `generate` says how.
      sampled: the model.
      prompts: what to answer, the same in all processes.
      path: the samples file.
      samples: responses to each; None: as the config says.
      **settings: see `sampling.SamplingSettings`; what is not given is as the config says.

    Returns:
      The file's records, in the order of the prompts, and the prompts that could not be answered.

    Raises:
      SamplesMismatch: the file has other samples.
      Preempted: SIGTERM or Ctrl-C came; finished responses are kept.
    """
    section = run.config.generate
    requests, length, refused = requests_of(
        sampled,
        prompts,
        sampled.settings(**(config_lib.sampling(section) | settings)),
        samples=samples or section.samples,
        max_length=section.max_length,
        long_prompts=section.long_prompts,
    )
    refused += _answer(run, sampled, prompts, requests, length, path)
    out_of = {one.id for one in refused}
    answered = any(request.id not in out_of for request in requests)
    if processes.is_first() and answered:
        Samples(path, sampled.name, prompts).finish(requests, out_of)
    processes.barrier("responses are written")
    return list(read(path)) if answered else [], refused


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
