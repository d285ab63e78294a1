"""Responses while training: the policy answers the same prompts every so many steps."""

import logging
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from attnpo_jax import config as config_lib
from attnpo_jax.data.prompts import Prompt, load_prompts
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling.engine import Engine
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.sampling.requests import requests_of
from attnpo_jax.sampling.responses import Request
from attnpo_jax.sampling.samples import Samples
from attnpo_jax.train.hooks import is_due
from attnpo_jax.train.loop import TrainLoop

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)


def sampling_hooks(run: "Run", backend: backends.Backend) -> list["SampleResponses"]:
    """The hook that the config's `train.samples` asks for, or none.

    Args:
      backend: what trains.

    Raises:
      UserError: a prompt can't be answered.
    """
    config, wanted = run.config, run.config.train.samples
    if not wanted.every:
        return []
    prompts = _prompts(run)[: wanted.count]
    mesh = backend if isinstance(backend, backends.Sharded) else backends.all_by_rows(run.policy)
    sampled = SampledModel.of(
        "", LanguageModel(run.model_folder, run.policy, {}, run.tokenizer), mesh
    )
    requests, length, refused = requests_of(
        sampled,
        prompts,
        sampled.settings(**config_lib.sampling(config.generate)),
        samples=config.generate.samples,
        max_length=config.generate.max_length,
        long_prompts=config.generate.long_prompts,
    )
    if refused:
        raise UserError(
            f"config.train.samples: prompt {refused[0].id}: {refused[0].reason}; accepted: other "
            "prompts, or config.generate that allows for them"
        )
    engine = sampled.engine(
        length=length,
        slots=min(config.generate.slots, len(requests)),
        dtype=jnp.dtype(config.model.dtype),
        quantized_cache=config.generate.cache == "int8",
        attention=config.model.attention,
    )
    return [SampleResponses(engine, prompts, requests, run.workdir / "samples", wanted.every)]


def _prompts(run: "Run") -> list[Prompt]:
    source = run.config.train.samples.prompts
    if source:
        prompts, bad = load_prompts(source, run.columns, run.config.data.max_example_bytes)
        if bad:
            raise bad[0]
        return prompts
    return run.held_out_prompts(run.config.train.samples.count)


class SampleResponses:
    """Has the policy answer prompts before the first step, after the last, and every so many
    steps between; from the parameters as they lie, and with a cache that is gone afterwards.

    Args:
      folder: where `train-step-N.jsonl` goes.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        folder: pathlib.Path,
        every: int,
    ):
        self._engine, self._prompts, self._requests = engine, prompts, requests
        self._folder, self._every = folder, every

    def begin(self, loop: TrainLoop) -> None:
        if loop.step == 0 or is_due(loop, self._every):
            self(loop)

    def is_due(self, loop: TrainLoop) -> bool:
        return not loop.stops and is_due(loop, self._every)

    def __call__(self, loop: TrainLoop) -> None:
        path = self._folder / f"train-step-{loop.step}.jsonl"
        if preemption.agreed(processes.is_first() and path.exists()):
            return  # by the run that this one continues
        self._engine.set_params(loop.state.policy)
        responses = list(self._engine.run(self._requests))
        self._engine.release()
        if processes.is_first():
            samples = Samples(path, f"step {loop.step}", self._prompts)
            by_key = {(request.id, request.sample): request for request in self._requests}
            failed = {one.id for one in responses if one.finish_reason == "error"}
            if failed:
                _LOG.warning(
                    "step %d: the model's logits are no numbers (NaN or infinite) for %d of %d "
                    "sampled prompts, which have no responses",
                    *(loop.step, len(failed), len(self._prompts)),
                )
            for response in responses:
                if response.id not in failed:
                    samples.add(by_key[response.id, response.sample], response)
            samples.close()
            records = samples.finish(self._requests, failed)
            loop.metrics.write_texts(
                loop.step,
                {
                    f"samples/{record['id']}/{record['sample']}": (
                        f"{record['prompt'][-1]['content']}\n\n{record['response']}"
                    )
                    for record in records
                },
            )
            _LOG.info("step %d: %d responses in %s", loop.step, len(records), path)
        loop.speed.restart()
