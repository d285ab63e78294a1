"""`attnpo train`: sets up what the loop needs from a run, and starts it where it left off."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax.config.fields import DECISIVE
from attnpo_jax.data.batching import EvalBatches, PairBatch, TrainBatches
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.losses import traits
from attnpo_jax.models import lora
from attnpo_jax.models.attention import implementations
from attnpo_jax.models.decoder import ModelConfig, Params, abstract_params
from attnpo_jax.pair_loss import StepSettings
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel import checkpoint, preemption, processes
from attnpo_jax.parallel.checkpoint import Checkpoints
from attnpo_jax.parallel.checkpoint_damage import CheckpointMismatch
from attnpo_jax.parallel.state import TrainState, create, create_adapted
from attnpo_jax.runtime import atomic, nested
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.metrics import MetricsWriter
from attnpo_jax.runtime.metrics import read as read_metrics
from attnpo_jax.train import choosing, hooks, optim
from attnpo_jax.train.evaluations import evaluation_hooks
from attnpo_jax.train.loop import TrainLoop
from attnpo_jax.train.profile import Begin, End, Profile, steps_of
from attnpo_jax.train.progress import TrainProgress
from attnpo_jax.train.samples import sampling_hooks
from attnpo_jax.train.step import make_eval_step, make_train_step
from attnpo_jax.train.summary import summary

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)


def train(run: "Run", *, console: Console | None = None) -> None:
    """Trains on the prepared pairs of a run, from its newest checkpoint if it has one.

    Writes `config.json`, `metrics.jsonl` and checkpoints. Evaluates before the first step and
    after the last, and in between as the config says. A table at the end shows the first evaluation
    beside the last.

    Args:
      run: the run, whose folder holds `prepared/`.
      console: where the table goes; None for standard output.

    Raises:
      FileNotFoundError: there is no prepared dataset.
      PreparedMismatch: it was prepared from something else than the config says.
      CheckpointMismatch: the checkpoints of `workdir` belong to another run.
      NonFiniteError: a loss or gradient was not finite.
      MeshError: the devices or the model do not fit `parallel.mesh`.
      AttentionError: `model.attention` cannot serve the model on these devices.
      Preempted: SIGTERM or Ctrl-C came; a checkpoint of the step under way is written, and
        evaluation at that step, if due or under way, is left to the run that resumes.
      LockedError: another run writes to the folder.
    """
    with run.writing():
        refuse_changed(run)
        _train(run)
    if processes.is_first():
        _show_summary(run, console or Console())


def refuse_changed(run: "Run") -> None:
    """Raises CheckpointMismatch where the run's checkpoints were trained with other settings.

    Of those, what the config says: it can be told before anything is computed or written.
    """
    run.checkpoint_folder  # noqa: B018  all processes look whether it is theirs
    # One looks for all: what others have seen of a bucket's folder, they would go on seeing.
    if processes.is_first():
        _refuse_changed(run)
    processes.barrier("train: settings are those of the checkpoints")


def _refuse_changed(run: "Run") -> None:
    found = checkpoint.newest_identity(run.checkpoint_folder)
    if found is None:
        return
    step, saved = found
    changed = nested.differences(saved, {"config": _decisive(run.config)}, "nothing")
    of_config = {name: pair for name, pair in changed.items() if name.startswith("config.")}
    if of_config:
        raise CheckpointMismatch(run.checkpoint_folder / str(step), of_config)


def _train(run: "Run") -> None:
    config, checkpoint_folder = run.config, run.checkpoint_folder
    run.source_layers  # noqa: B018  a layer that the model lacks is told of before anything runs
    backend = backends.for_training(run.policy, config.parallel)
    other = None if run.reference is None else run.reference.shape
    reference = reference_in_memory(config, run.model, other)
    attention = _attention(run, backend, reference)
    data = {split: run.open_prepared(split) for split in run.splits}
    batches, eval_batches = _batches(config, backend, data)
    profiled = steps_of(config.log.profile, len(batches))
    settings = config_lib.step_settings(
        config,
        run.policy,
        data["train"].source_layers,
        attention,
        data["train"].columns,
        reference,
        data["train"].num_layers,
    )
    compiled = compile_step(config, settings, backend, len(batches))
    eval_step = backend.eval_step(make_eval_step(settings, backend.axis_name), reference)
    samples = sampling_hooks(run, backend)
    is_of = identity(config, run.model, data["train"])
    evaluations = evaluation_hooks(run, backend, is_of)

    with Checkpoints(checkpoint_folder, is_of, keep=config.train.keep_checkpoints) as checkpoints:
        state, restored = _start(run, backend, compiled, checkpoints, batches)
        state = _with_reference(run, backend, reference, state)
        start = int(state.step)
        _keep_config(run)
        _say_where_it_begins(run, start if restored else None, len(batches))
        bar = config.log.progress and processes.is_first() and start < len(batches)
        with (
            _metrics(run, start) as metrics,
            preemption.watch_steps(start) as notice,
            TrainProgress(len(batches), start, bar=bar) as progress,
            _recorded(run, start, len(batches)),
            Profile(profiled, run.workdir) as profile,
        ):
            loop = TrainLoop(
                state=state,
                step=start,
                total_steps=len(batches),
                steps_per_epoch=batches.steps_per_epoch,
                last_saved=start if restored else None,
                metrics=metrics,
                progress=progress,
            )
            evaluates = hooks.Evaluate(
                eval_step,
                eval_batches,
                backend.put_batch,
                notice.between,
                every=config.train.eval_every,
            )
            before = [evaluates, *samples, *evaluations]
            saves = hooks.Save(checkpoints, every=config.train.save_every)
            loop.run(
                batches,
                compiled.run,
                backend.put_batch,
                notice.after_step,
                hooks.Report(
                    data["train"],
                    every=config.train.log_every,
                    beta=_beta_at_first(run, settings),
                ),
                # In this order.
                [
                    End(profile),
                    *before,
                    *choosing.hooks_of(config.train, before, checkpoints),
                    saves,
                    hooks.Stop(checkpoints),
                    Begin(profile),
                ],
                checkpoints,
            )


def _keep_config(run: "Run") -> None:
    """Keeps the config with what comes of it."""
    if processes.is_first():
        path = run.workdir / "config.json"
        atomic.write_atomically(path, config_lib.to_json(run.config).encode())


def _metrics(run: "Run", start: int) -> MetricsWriter:
    return MetricsWriter(
        run.workdir,
        start,
        log=run.config.log,
        config=run.config.to_dict(),
        log_every=run.config.train.log_every,
        writes=processes.is_first(),
    )


def _show_summary(run: "Run", console: Console) -> None:
    lines = [line for line in read_metrics(run.workdir) if "eval_loss" in line]
    if lines:
        console.print(summary(lines[0], lines[-1]))


def _say_where_it_begins(run: "Run", restored: int | None, total: int) -> None:
    if restored is None:
        return
    if restored < total:
        _LOG.info("goes on from step %d of %d, saved in %s", restored, total, run.checkpoint_folder)
    else:
        _LOG.info("all %d steps are done, and saved in %s", total, run.checkpoint_folder)


def _beta_at_first(run: "Run", settings: StepSettings) -> float | None:
    """The rewards' scale, where they are of a policy that is its reference to begin with."""
    of_itself = run.reference is None and traits(settings.objective).of_log_ratios
    return settings.beta if of_itself else None


def _recorded(run: "Run", start: int, total: int) -> contextlib.AbstractContextManager[None]:
    """Has the workdir's history tell of the steps, if there are any left to do."""
    if start >= total:
        return contextlib.nullcontext()
    return run.recorded("train", step=start, steps=total)


def _attention(run: "Run", backend: backends.Backend, reference: ModelConfig | None = None) -> str:
    """The attention implementation; says what computes, and warns of devices without work."""
    config = run.config
    _LOG.info("training on %s", backend.description)
    if config.train.batch_size < backend.row_shards and processes.is_first():
        _LOG.warning(
            "train.batch_size = %d pairs for %d groups of devices (data x fsdp): the others "
            "compute on padding; a larger one, or a smaller mesh, would keep all busy",
            config.train.batch_size,
            backend.row_shards,
        )

    def choose(model):
        kind = config.model.dtype, backend.devices
        return implementations.choose(config.model.attention, model, *kind)

    choice = choose(run.model)
    _LOG.info("attention: %s", choice)
    if reference is not None and choose(reference).implementation != choice.implementation:
        raise UserError(
            f"config.model.attention = {config.model.attention!r}: {choice.implementation!r} "
            "serves the policy and not the reference, whose distribution the objective reads; "
            "accepted: 'xla'"
        )
    return choice.implementation


def _batches(
    config: config_dict.ConfigDict, backend: backends.Backend, data: dict[str, Prepared]
) -> tuple[TrainBatches, EvalBatches | None]:
    rows = {
        "num_buckets": config.data.num_buckets,
        "row_multiple": backend.row_shards,
        "local_rows": backend.local_rows,
    }
    batches = TrainBatches(
        data["train"],
        batch_size=config.train.batch_size,
        microbatch_size=config.train.microbatch_size,
        shuffle=config.data.shuffle,
        seed=config.seed,
        epochs=config.train.epochs,
        steps=config.train.steps,
        pairs=config.train.pairs,
        **rows,
    )
    _LOG.info(
        "%d steps in %d shapes (microbatches x rows x tokens: %s), %.1f%% padding",
        len(batches),
        len(batches.shapes),
        ", ".join(f"{s.microbatches} x {s.rows} x {s.length}" for s in batches.shapes),
        100 * batches.padding,
    )
    if "eval" not in data:
        return batches, None
    return batches, EvalBatches(data["eval"], batch_size=config.train.eval_batch_size, **rows)


def reference_in_memory(
    config: config_dict.ConfigDict, model: ModelConfig, other: ModelConfig | None
) -> ModelConfig | None:
    """The shape of the reference whose parameters training holds beside the policy's.

    Args:
      config: the run's config.
      model: the shape of the model that training starts from.
      other: that of the reference, where it is another model.

    Returns:
      The shape; None where the objective does not read the reference's distribution, or the
      reference is the model without the adapters that are trained.

    Raises:
      UserError: the two have vocabularies of different sizes.
    """
    if not config_lib.reads_distribution(config) or (other is None and config.lora.rank > 0):
        return None
    if other is not None and other.vocab_size != model.vocab_size:
        raise UserError(
            f"config.reference.source = {config.reference.source!r} has vocab_size = "
            f"{other.vocab_size}, config.model.source {model.vocab_size}: the distributions that "
            f"{config.objective.name!r} compares are not over the same tokens; accepted: equal ones"
        )
    return model if other is None else other


def _with_reference(
    run: "Run", backend: backends.Backend, reference: ModelConfig | None, state: TrainState
) -> TrainState:
    """The state with the parameters of the reference, if it is to be held in memory."""
    if reference is None:
        return state
    shardings = backend.of(reference).parameter_shardings()
    params = run.load_params(reference, shardings, of=run.reference)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    _LOG.info("the reference is in memory beside the policy: %.2f GiB in all", size / 2**30)
    return dataclasses.replace(state, reference=params)


def _start(
    run: "Run",
    backend: backends.Backend,
    compiled: "CompiledStep",
    checkpoints: Checkpoints,
    batches: TrainBatches,
) -> tuple[TrainState, bool]:
    """The state to go on from, and whether it is a checkpoint's."""
    if run.policy.lora is None and checkpoints.steps():
        run.drop_params()  # not wanted beside the checkpoint's
    restored = checkpoints.restore(compiled.abstract_state)
    if restored is not None and run.policy.lora is None:
        return restored, True
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        reading = reader.submit(run.load_params, run.model, backend.parameter_shardings())
        step = 0 if restored is None else int(restored.step)
        if step < len(batches):
            compiled.compile(backend.put_batch(batches[step]))
    params = reading.result()
    if restored is not None:
        return dataclasses.replace(restored, base=params), True
    return backend.create_state(compiled.first_state, params), False  # parameters are donated


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The training step of a run, compiled when it is first called or lowered.

    Attributes:
      first_state: the model's parameters -> the state before the first step.
      abstract_state: what a state is, with every array's sharding; nothing is allocated.
      run: `(state, batch) -> (state, metrics)`.
    """

    first_state: Callable[[Params], TrainState]
    abstract_state: TrainState
    run: Callable[[TrainState, PairBatch], tuple[TrainState, dict[str, jax.Array]]]

    def compile(self, batch: PairBatch) -> None:
        """Compiles the step for batches like this one, for which no state has to be there."""
        self.run.lower(self.abstract_state, batch).compile()


def compile_step(
    config: config_dict.ConfigDict,
    settings: StepSettings,
    backend: backends.Backend,
    total_steps: int,
) -> CompiledStep:
    """The training step as the config says, for the backend's devices.

    Args:
      config: its sections `optim` and `model` are used, and its seed.
      settings: see `config.step_settings`.
      backend: places the state and compiles the step.
      total_steps: optimizer steps of the whole run, for the schedule.
    """
    schedule = optim.make_schedule(config.optim, total_steps)
    optimizer = optim.make_optimizer(config.optim, schedule)
    first_state, shapes = _first_state(config, settings.model, optimizer)
    abstract_state = backend.abstract_state(shapes)
    if settings.reference is not None:
        params = abstract_params(settings.reference, jnp.dtype(config.model.param_dtype))
        held = backend.of(settings.reference).abstract_state(params)
        abstract_state = dataclasses.replace(abstract_state, reference=held)
    step = make_train_step(settings, optimizer, schedule, backend.axis_name)
    return CompiledStep(first_state, abstract_state, backend.train_step(step, abstract_state))


def _first_state(config, model, optimizer) -> tuple[Callable[[Params], TrainState], TrainState]:
    """The function that makes the first state of the model's parameters, and its shapes."""
    first_state = functools.partial(create, optimizer=optimizer)
    if model.lora is not None:
        first_state = functools.partial(
            create_adapted, optimizer=optimizer, model=model, seed=config.seed
        )
    params = abstract_params(lora.without(model), jnp.dtype(config.model.param_dtype))
    return first_state, jax.eval_shape(first_state, params)


def initial_state(config: config_dict.ConfigDict, model: ModelConfig) -> TrainState:
    """The state that training starts from, as shapes.

    Args:
      config: see `attnpo_jax.config.default_config`.
      model: the model's shape, with its adapters.
    """
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 1))
    return _first_state(config, model, optimizer)[1]


def identity(config: config_dict.ConfigDict, model: ModelConfig, data: Prepared) -> dict[str, Any]:
    """What a run must share with a checkpoint in order to continue it."""
    return {
        "config": _decisive(config),
        "model": model.facts(),
        "prepared": data.identity,
    }


def _decisive(config: config_dict.ConfigDict) -> dict[str, Any]:
    """The fields that a run which continues another one must share with it."""
    return {
        field: value
        for field, value in config_lib.flatten(config).items()
        if field in DECISIVE or field.split(".")[0] in DECISIVE
    }
