"""The training loop: `train(config, workdir)`, in the order in which things happen.

A step's metrics are read while the next step runs, so that the device never waits for the host.
Before a checkpoint is written, all metrics up to its step are on the disk, and evaluation at that
step is done, unless the run was told to stop: then it is left to the run that resumes, which
evaluates first where `metrics.jsonl` lacks it.
"""

import dataclasses
import functools
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax import losses, weighting
from attnpo_jax.config.fields import DECISIVE
from attnpo_jax.data.batching import EvalBatches, PairBatch, TrainBatches
from attnpo_jax.data.prepared import METADATA, Prepared
from attnpo_jax.models import lora
from attnpo_jax.models.attention import implementations as attention_backends
from attnpo_jax.models.decoder import ModelConfig, Params, abstract_params
from attnpo_jax.models.io import hf_folder as models
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.parallel.checkpoint import Checkpoints, folder_of
from attnpo_jax.prepare.provenance import open_prepared, split_path
from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.metrics import MetricsWriter
from attnpo_jax.runtime.metrics import read as read_metrics
from attnpo_jax.train import optim
from attnpo_jax.train.progress import Throughput, TrainProgress
from attnpo_jax.train.state import TrainState, create, create_adapted
from attnpo_jax.train.step import StepSettings, make_eval_step, make_train_step

_LOG = logging.getLogger(__name__)

# Batches that wait, ready, for the device.
AHEAD = 4


class NonFiniteError(FloatingPointError):
    """A step whose loss or gradient is not finite; the run has stopped.

    Attributes:
      step: the step, counted from 1.
      pair_ids: the pairs whose loss is not finite, or all of the step's if each one's is.
    """

    def __init__(
        self, step: int, values: Mapping[str, float], pair_ids: list[str], last: int | None
    ):
        kept = (
            f"the checkpoint of step {last} is kept"
            if last is not None
            else "no checkpoint has been written yet"
        )
        super().__init__(
            f"step {step}: loss is {values['loss']}, grad_norm {values['grad_norm']}; "
            f"pairs: {', '.join(pair_ids)}; {kept}"
        )
        self.step = step
        self.pair_ids = pair_ids


def train(config: config_dict.ConfigDict, workdir: str | os.PathLike) -> None:
    """Trains on the prepared pairs of `workdir`, from its newest checkpoint if it has one.

    Writes `config.json`, `metrics.jsonl` and checkpoints. Evaluates before the first step and
    after the last, and in between as the config says.

    Args:
      config: see `attnpo_jax.config.default_config`.
      workdir: the run's folder, which holds `prepared/`.

    Raises:
      ConfigError: the config is wrong; nothing was loaded.
      FileNotFoundError: there is no prepared dataset.
      PreparedMismatch: it was prepared from something else than the config says.
      CheckpointMismatch: the checkpoints of `workdir` belong to another run.
      NonFiniteError: a loss or gradient was not finite.
      MeshError: the devices or the model do not fit `parallel.mesh`.
      ProcessesError: of several processes, some have other folders than the rest.
      AttentionError: `model.attention` cannot serve the model on these devices.
      Preempted: SIGTERM came; a checkpoint of the step under way is written, and evaluation at that
        step, if due or under way, is left to the run that resumes.
    """
    config_lib.validate(config)
    workdir, checkpoint_folder = pathlib.Path(workdir), folder_of(config, workdir)
    processes.check_shared(workdir, "workdir")
    if config.train.checkpoint_dir and "://" not in os.fspath(checkpoint_folder):
        processes.check_shared(checkpoint_folder, "config.train.checkpoint_dir")
    model_folder = models.resolve(config.model.source)
    model = models.load_config(model_folder)
    config_lib.check_layers(config, model.num_layers, model.layer_windows)
    policy = lora.adapted(model, config.lora)
    backend = backends.for_training(policy, config.parallel)
    _LOG.info("training on %s", backend.description)
    if config.train.microbatch_size < backend.row_shards and processes.is_first():
        _LOG.warning(
            "train.microbatch_size = %d pairs for %d groups of devices (data x fsdp): the others "
            "compute on padding; a larger one, or a smaller mesh, would keep all busy",
            config.train.microbatch_size,
            backend.row_shards,
        )
    attention = attention_backends.choose(
        config.model.attention, model, config.model.dtype, backend.devices
    )
    _LOG.info("attention: %s", attention)

    splits = ("train", "eval") if config.data.eval else ("train",)
    for split in splits:
        if not (split_path(workdir, split) / METADATA).is_file():
            raise FileNotFoundError(
                f"{split_path(workdir, split)}: not prepared, or not to the end; run `attnpo "
                "prepare` with this config and workdir first"
            )
    data = open_prepared(config, workdir, "train")
    batches = TrainBatches(
        data,
        batch_size=config.train.batch_size,
        microbatch_size=config.train.microbatch_size,
        shuffle=config.data.shuffle,
        seed=config.seed,
        epochs=config.train.epochs,
        steps=config.train.steps,
        num_buckets=config.data.num_buckets,
        row_multiple=backend.row_shards,
        local_rows=backend.local_rows,
    )
    total_steps = len(batches)
    _LOG.info(
        "%d steps; rows come in %d shapes (rows x tokens: %s), %.1f%% padding",
        total_steps,
        len(batches.shapes),
        ", ".join(f"{shape.rows} x {shape.length}" for shape in batches.shapes),
        100 * batches.padding,
    )
    eval_batches = None
    if config.data.eval:
        eval_batches = EvalBatches(
            open_prepared(config, workdir, "eval"),
            batch_size=config.train.eval_batch_size,
            num_buckets=config.data.num_buckets,
            row_multiple=backend.row_shards,
            local_rows=backend.local_rows,
        )

    settings = step_settings(
        config, policy, data.source_layers, attention.backend, data.weight_columns
    )
    compiled = compile_step(config, settings, backend, total_steps)
    eval_step = backend.eval_step(make_eval_step(settings, backend.axis_name))

    with Checkpoints(
        checkpoint_folder,
        identity(config, model, data),
        keep=config.train.keep_checkpoints,
    ) as checkpoints:
        restored = checkpoints.restore(compiled.abstract_state)
        if restored is None or policy.lora is not None:
            params = models.load_params(
                model_folder,
                model,
                param_dtype=jnp.dtype(config.model.param_dtype),
                shardings=backend.parameter_shardings(),
            )
        if restored is None:
            state, start = backend.create_state(compiled.first_state, params), 0
            del params  # donated
        else:
            state, start = restored, int(restored.step)
            if policy.lora is not None:
                state = dataclasses.replace(state, base=params)
        last_saved = start if restored is not None else None
        first = processes.is_first()
        if first:
            atomic.write_atomically(workdir / "config.json", config_lib.to_json(config).encode())

        with (
            MetricsWriter(
                workdir, start, log=config.log, config=config.to_dict(), writes=first
            ) as metrics,
            TrainProgress(total_steps, start, bar=config.log.progress and first) as progress,
            preemption.watch_steps(start) as notice,
        ):
            speed = Throughput()

            def report(step: int, of_step: dict[str, jax.Array]) -> None:
                """Waits for a step, checks it, and writes its metrics if they are wanted."""
                counted = ("loss", "grad_norm", "pairs", "tokens")
                values = {k: v.item() for k, v in _fetch(of_step, counted).items()}
                finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
                speed.add(values["pairs"], values["tokens"])
                if step % config.train.log_every == 0 or step == total_steps or not finite:
                    scalars = [name for name, value in of_step.items() if value.ndim == 0]
                    values = {k: v.item() for k, v in _fetch(of_step, scalars).items()}
                    values["epoch"] = step / batches.steps_per_epoch
                    values |= speed.look()
                    metrics.write(step, values)
                    progress.metrics(step, values)
                progress.step(step)
                if not finite:
                    metrics.flush()
                    ids = _suspects(data, of_step)
                    raise NonFiniteError(step, values, ids, last_saved)

            def evaluate_at(step: int) -> bool:
                """Whether it was told to stop meanwhile; then the evaluation counts for nothing."""
                if eval_batches is None:
                    return False
                progress.note("evaluating")
                values = evaluate(
                    eval_step, state.policy, eval_batches, backend.put_batch, notice.between
                )
                if values is None:
                    return True
                metrics.write(step, values | {"epoch": step / batches.steps_per_epoch})
                speed.restart()
                return False

            # Only the first process reads what it alone writes.
            evaluated = first and any(
                line["step"] == start and any(name.startswith("eval_") for name in line)
                for line in read_metrics(workdir)
            )
            due = start == 0 or _is_due(start, config.train.eval_every, total_steps)
            if due and not preemption.agreed(evaluated) and evaluate_at(start):
                raise preemption.Preempted(
                    f"told to stop while evaluating, after step {start} of {total_steps}, where "
                    "this run began; the same command goes on from there"
                )
            unreported: tuple[int, dict[str, jax.Array]] | None = None
            speed.restart()
            for step, host_batch in enumerate(read_ahead(batches, start), start + 1):
                batch = backend.put_batch(host_batch)
                with jax.transfer_guard("disallow"):
                    state, of_step = compiled.run(state, batch)
                if unreported is not None:
                    report(*unreported)
                unreported = step, of_step
                checkpoints.check()

                evaluates = _is_due(step, config.train.eval_every, total_steps)
                stops = notice.after_step()
                saves = stops or _is_due(step, config.train.save_every, total_steps)
                if evaluates or saves:
                    report(*unreported)
                    unreported = None
                if evaluates and not stops:
                    stops = evaluate_at(step)
                if saves or stops:
                    metrics.flush()
                    checkpoints.save(state)
                    last_saved = step
                    speed.restart()
                if stops:
                    checkpoints.wait()
                    raise preemption.Preempted(
                        f"told to stop: step {step} of {total_steps} is saved; the same command "
                        "goes on from there"
                    )
            checkpoints.wait()


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


def compile_step(
    config: config_dict.ConfigDict,
    settings: StepSettings,
    backend: backends.Backend,
    total_steps: int,
) -> CompiledStep:
    """The training step as the config says, for the backend's devices.

    Args:
      config: its sections `optim` and `model` are used, and its seed.
      settings: see `step_settings`.
      backend: places the state and compiles the step.
      total_steps: optimizer steps of the whole run, for the schedule.
    """
    schedule = optim.make_schedule(config.optim, total_steps)
    optimizer = optim.make_optimizer(config.optim, schedule)
    first_state, shapes = _first_state(config, settings.model, optimizer)
    abstract_state = backend.abstract_state(shapes)
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


def step_settings(
    config: config_dict.ConfigDict,
    model: ModelConfig,
    source_layers: tuple[int, ...],
    attention: str,
    weight_columns: tuple[str, ...] = (),
) -> StepSettings:
    """What the config says about a step.

    Args:
      config: see `attnpo_jax.config.default_config`.
      model: the model's shape.
      source_layers: the layers on the prepared dataset's source axis.
      attention: the backend that was chosen.
      weight_columns: the ready-made weights that the prepared dataset has.
    """
    return StepSettings(
        model=model,
        weighting=config_lib.bind_section(weighting, config.weighting),
        objective=config_lib.bind_section(losses, config.objective),
        # An objective of one's own need not have a beta; its rewards are plain log-ratios.
        beta=config.objective.get("beta", 1.0),
        source_layers=source_layers,
        weight_columns=weight_columns,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        attention=attention,
        logps_chunk=config.model.logps_chunk,
    )


def identity(config: config_dict.ConfigDict, model: ModelConfig, data: Prepared) -> dict[str, Any]:
    """What a run must share with a checkpoint in order to continue it."""
    fields = config_lib.flatten(config)
    decisive = {
        field: value
        for field, value in fields.items()
        if field in DECISIVE or field.split(".")[0] in DECISIVE
    }
    return {
        "config": decisive,
        "model": model.facts(),
        "prepared": data.meta["components"],
    }


def evaluate(
    eval_step: Callable[[Any, PairBatch], dict[str, jax.Array]],
    params: Any,
    batches: EvalBatches,
    put_batch: Callable[[PairBatch], PairBatch] = jax.device_put,
    stops: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Means over all pairs of `batches`, under the names of the training metrics after `eval_`.

    Args:
      eval_step: see `step.make_eval_step`.
      params: the model's parameters.
      batches: the batches.
      put_batch: brings one to the devices.
      stops: whether to leave off; asked after every batch but the last.

    Returns:
      The means; None if it left off.
    """
    on_host, waiting = [], None
    for number, host_batch in enumerate(read_ahead(batches), 1):
        batch = put_batch(host_batch)
        with jax.transfer_guard("disallow"):
            running = eval_step(params, batch)
        # One batch behind: the device does not wait, and the host does not hurry ahead of it, to
        # where it would ask in vain.
        if waiting is not None:
            on_host.append(jax.device_get(waiting))
        waiting = running
        if number < len(batches) and stops():
            return None
    on_host.append(jax.device_get(waiting))
    totals = {name: math.fsum(float(s[name]) for s in on_host) for name in on_host[0]}
    pairs = totals.pop("pairs")
    return {f"eval_{name}": total / pairs for name, total in totals.items()}


def read_ahead(batches: TrainBatches | EvalBatches, start: int = 0) -> Iterator[PairBatch]:
    """Batches `start`, `start + 1`, ... in order, made by threads before they are asked for."""
    if start == len(batches):
        return iter(())
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=AHEAD)
    return iter(grain.MapDataset.source(batches)[start:].to_iter_dataset(options))


def _is_due(step: int, every: int, total_steps: int) -> bool:
    return step == total_steps or (every > 0 and step % every == 0)


def _fetch(values: Mapping[str, jax.Array], names: Any) -> dict[str, np.ndarray]:
    return jax.device_get({name: values[name] for name in names})


def _suspects(data: Prepared, of_step: Mapping[str, jax.Array]) -> list[str]:
    """Ids of the step's pairs whose loss is not finite; of all its pairs if every loss is."""
    arrays = _fetch(of_step, ("pair", "pair_loss"))
    there = arrays["pair"] >= 0
    bad = there & ~np.isfinite(arrays["pair_loss"])
    rows = np.sort(arrays["pair"][bad if bad.any() else there])
    return [data[int(row)]["id"] for row in rows]
