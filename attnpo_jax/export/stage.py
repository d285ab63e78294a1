"""`attnpo export`: the newest checkpoint as a Hugging Face folder, or as an adapter for PEFT."""

import logging
import os
import pathlib
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from attnpo_jax.models import lora
from attnpo_jax.models.decoder import abstract_params
from attnpo_jax.models.io import embedded, hf_folder, hf_save, peft
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel import checkpoint, gathering, preemption, processes

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)


def export(run: "Run", out: str | os.PathLike | None = None) -> pathlib.Path:
    """Writes the parameters of the newest whole checkpoint as a folder that transformers loads.

    Tokenizer and generation config come from the model that training started with, and the chat
    template too, unless the config names another. Where adapters were trained, `lora.export` says
    what is written: the model with them merged in, the adapters as PEFT reads them, or both; then
    the adapters go beside the model, into a folder whose name ends in `-adapter`.

    Of several processes, all hold their part of the parameters, and the first one writes them as
    they come, tensor by tensor.

    Args:
      run: the run.
      out: where to; None for `workdir/export`. An earlier export there is replaced, or left as it
        is if it holds these very parameters.

    Returns:
      The folder written.

    Raises:
      FileNotFoundError: there is no checkpoint.
      CheckpointMismatch: the checkpoint is of another model than the config's, or its adapters are.
      MeshError: the devices or the model do not fit `parallel.mesh`.
      OSError: the folder can't be written; an earlier export stays. The other processes get
        `gathering.FirstProcessFailed`.
    """
    out = run.workdir / "export" if out is None else pathlib.Path(out)
    checkpoints = run.checkpoint_folder  # all processes look whether it is theirs
    if processes.is_first():
        hf_save.clear_up(out)
    adapted = bool(run.config.lora.rank)
    newest = _origin(run, checkpoints) if processes.is_first() and not adapted else None
    written = newest is not None and hf_save.read_origin(out) == newest
    if preemption.agreed(written):
        if written:
            _LOG.info("%s holds the model of step %d already", out, newest["step"])
    elif adapted:
        _export_adapted(run, out)
    else:
        _export(run, out)
    processes.barrier("export: written")
    return out


def _origin(run: "Run", checkpoints: Any, step: int | None = None) -> dict[str, Any] | None:
    """What an export is made of; None if there is no checkpoint that says so."""
    origin = checkpoint.origin(checkpoints, step)
    return origin if origin is None else origin | {"chat_template": run.chat_template}


def _export(run: "Run", out: pathlib.Path) -> None:
    backend = backends.for_training(run.model, run.config.parallel)
    abstract = abstract_params(run.model, jnp.dtype(run.config.model.param_dtype))
    params, step = checkpoint.restore_params(
        run.checkpoint_folder, backend.abstract_state(abstract)
    )
    origin = _origin(run, run.checkpoint_folder, step)
    with gathering.for_first(params) as readable:
        if readable is not None:
            hf_save.save(
                out,
                run.model,
                readable,
                source_folder=run.model_folder,
                chat_template=run.chat_template,
                origin=origin,
            )


def _export_adapted(run: "Run", out: pathlib.Path) -> None:
    config, policy, source = run.config, run.policy, run.model_folder
    backend = backends.for_training(policy, config.parallel)
    # Without the base that they were trained on, and the scale that they were trained with,
    # adapters are worth nothing: neither shows in their shapes.
    identity: dict[str, Any] = {
        "config": {f"lora.{field}": config.lora[field] for field in ("rank", "alpha", "targets")},
        "prepared": {"model": {"weights": run.weights_digest}},
    }
    abstract = backend.abstract_state(lora.abstract_adapters(policy))
    adapters, _ = checkpoint.restore_params(run.checkpoint_folder, abstract, identity)
    if config.lora.export in ("merged", "both"):
        params = hf_folder.load_params(
            source,
            run.model,
            # Training may have held them in less.
            param_dtype=hf_folder.stored_dtype(source),
            shardings=backend.parameter_shardings(),
        )
        params = lora.merge(policy, params, adapters)
        with gathering.for_first(params) as readable:
            if readable is not None:
                hf_save.save(
                    out, run.model, readable, source_folder=source, chat_template=run.chat_template
                )
    if config.lora.export in ("adapter", "both"):
        both = config.lora.export == "both"
        # A name from the hub means the same to whoever gets the adapter; a path is all there is
        # for other models.
        of_hub = not pathlib.Path(config.model.source).expanduser().is_dir() and (
            config.model.source != embedded.ALIAS
        )
        with gathering.for_first(adapters) as readable:
            if readable is not None:
                peft.save_adapter(
                    out.with_name(f"{out.name}-adapter") if both else out,
                    policy,
                    readable,
                    base=config.model.source if of_hub else str(source.absolute()),
                    source_folder=source,
                    chat_template=run.chat_template,
                )
