"""`attnpo export`: a checkpoint as a Hugging Face folder, or as an adapter for PEFT."""

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
from rich.console import Console

from attnpo_jax.data.manifest import canonical
from attnpo_jax.models import lora
from attnpo_jax.models.decoder import abstract_params
from attnpo_jax.models.io import embedded, hf_folder, hf_save, peft
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel import checkpoint, gathering, preemption, processes
from attnpo_jax.runtime.printable import say

if TYPE_CHECKING:
    from attnpo_jax.run import Run


# What the folders hold.
_KINDS = {
    "model": "the model of step {} for transformers",
    "adapter": "adapters of step {} for PEFT",
}


def export(
    run: "Run",
    out: str | os.PathLike | None = None,
    *,
    step: str | int | None = None,
    console: Console | None = None,
) -> pathlib.Path:
    """Writes the parameters of a checkpoint as a folder that transformers loads.

    Tokenizer and generation config come from the model that training started with, and the chat
    template too, unless the config names another. Where adapters were trained, `lora.export` says
    what is written: the model with them merged in, the adapters as PEFT reads them, or both; then
    the adapters go beside the model, into a folder whose name ends in `-adapter`.

    Of several processes, all hold their part of the parameters, and the first one writes them as
    they come, tensor by tensor.

    Args:
      run: the run.
      out: where to; None for `workdir/export`. An earlier export there is replaced, or left as it
        is if it holds these very parameters, with the same files beside them.
      step: the checkpoint's, see `Run.checkpoint_step`.
      console: where the folders' names go, and what they hold; None for standard output.

    Returns:
      The folder written.

    Raises:
      FileNotFoundError: there is no checkpoint.
      UserError: there is none of that step, or no way to tell the best.
      CheckpointMismatch: the checkpoint is of another model than the config's, or its adapters are.
      MeshError: the devices or the model do not fit `parallel.mesh`.
      OSError: the folder can't be written; an earlier export stays. The other processes get
        `gathering.FirstProcessFailed`.
      LockedError: another run writes to the workdir, and `out` is None.
    """
    with run.writing() if out is None else contextlib.nullcontext():
        return _export_all(run, out, step, console)


def _export_all(
    run: "Run",
    out: str | os.PathLike | None,
    asked: str | int | None,
    console: Console | None,
) -> pathlib.Path:
    run.checkpoint_folder  # noqa: B018  all processes look whether it is theirs
    wanted = run.checkpoint_step(asked)
    folders, first = export_folders(run, out), processes.is_first()
    origin = None
    if first:
        for folder in folders.values():
            hf_save.clear_up(folder)
        origin = _origin(run, wanted)
    there = origin is not None and all(
        hf_save.read_origin(folder) == origin | {"holds": kind} for kind, folder in folders.items()
    )
    if preemption.agreed(there):
        step = origin["step"] if first else None
    else:
        # Where there is no checkpoint, nothing is begun.
        begun = run.recorded("export") if origin and out is None else contextlib.nullcontext()
        with begun:
            if run.config.lora.rank:
                step = _export_adapted(run, folders, wanted)
            else:
                step = _export(run, folders["model"], wanted)
    processes.barrier("export: written")
    if first:
        console = console or Console()
        for kind, folder in folders.items():
            what = f"{_KINDS[kind].format(step)}{', as it was before' if there else ''}"
            say(console, f"{folder}: {what} ({_extent(folder)})")
    return next(iter(folders.values()))


def export_folders(
    run: "Run", out: str | os.PathLike | None = None
) -> dict[Literal["model", "adapter"], pathlib.Path]:
    """What `export` writes, and where to."""
    out = run.workdir / "export" if out is None else pathlib.Path(out)
    if not run.config.lora.rank or run.config.lora.export == "merged":
        return {"model": out}
    if run.config.lora.export == "adapter":
        return {"adapter": out}
    return {"model": out, "adapter": out.with_name(f"{out.name}-adapter")}


def _extent(folder: pathlib.Path) -> str:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def _origin(run: "Run", step: int | None = None) -> dict[str, Any] | None:
    """What an export is made of; None if there is no checkpoint that says so."""
    origin = checkpoint.origin(run.checkpoint_folder, step)
    if origin is None:
        return None
    return canonical(origin | _taken(run))


def _taken(run: "Run") -> dict[str, Any]:
    """What an export has from elsewhere than the checkpoint."""
    return {
        "chat_template": run.chat_template,
        "source": {
            # Which has the base of adapters, and what tensors are stored in.
            "weights": run.weights_digest,
            "files": hf_save.companions_digest(run.model_folder),
        },
        "lora": run.adapters_identity["config"] if run.config.lora.rank else None,
    }


def _export(run: "Run", out: pathlib.Path, wanted: int | None) -> int:
    backend = backends.for_training(run.model, run.config.parallel)
    abstract = abstract_params(run.model, jnp.dtype(run.config.model.param_dtype))
    params, step = checkpoint.restore_params(
        run.checkpoint_folder, backend.abstract_state(abstract), step=wanted
    )
    with gathering.for_first(params) as readable:
        if readable is not None:
            _save_model(run, out, readable, step)
    return step


def _save_model(run: "Run", out: pathlib.Path, params: Any, step: int) -> None:
    hf_save.save(
        out,
        run.model,
        params,
        source_folder=run.model_folder,
        chat_template=run.chat_template,
        origin=_origin(run, step) | {"holds": "model"},
    )


def _export_adapted(run: "Run", folders: Mapping[str, pathlib.Path], wanted: int | None) -> int:
    config, policy, source = run.config, run.policy, run.model_folder
    backend = backends.for_training(policy, config.parallel)
    abstract = backend.abstract_state(lora.abstract_adapters(policy))
    adapters, step = checkpoint.restore_params(
        run.checkpoint_folder, abstract, run.adapters_identity, step=wanted
    )
    if "model" in folders:
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
                _save_model(run, folders["model"], readable, step)
    if "adapter" in folders:
        # A name from the hub means the same to whoever gets the adapter; a path is all there is
        # for other models.
        of_hub = not pathlib.Path(config.model.source).expanduser().is_dir() and (
            config.model.source != embedded.ALIAS
        )
        with gathering.for_first(adapters) as readable:
            if readable is not None:
                peft.save_adapter(
                    folders["adapter"],
                    policy,
                    readable,
                    base=config.model.source if of_hub else str(source.absolute()),
                    source_folder=source,
                    chat_template=run.chat_template,
                    origin=_origin(run, step) | {"holds": "adapter"},
                )
    return step
