"""`attnpo export`: the newest checkpoint as a Hugging Face folder."""

import logging
import os
import pathlib

import jax.numpy as jnp
from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax.models import checkpoints as models
from attnpo_jax.models.decoder import abstract_params
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel import processes
from attnpo_jax.train import checkpoint

_LOG = logging.getLogger(__name__)


def export(
    config: config_dict.ConfigDict,
    workdir: str | os.PathLike,
    out: str | os.PathLike | None = None,
) -> pathlib.Path:
    """Writes the parameters of the newest whole checkpoint as a folder that transformers loads.

    Tokenizer, chat template and generation config come from the model that training started with.

    Args:
      config: the run's config.
      workdir: the run's folder.
      out: where to; None for `workdir/export`. An earlier export there is replaced, or left as it
        is if it holds these very parameters.

    Returns:
      The folder written.

    Raises:
      ConfigError: the config is wrong.
      FileNotFoundError: there is no checkpoint.
      CheckpointMismatch: the checkpoint is of another model than the config's.
      OSError: the folder can't be written; an earlier export stays.
    """
    config_lib.validate(config)
    workdir = pathlib.Path(workdir)
    out = workdir / "export" if out is None else pathlib.Path(out)
    folder = checkpoint.folder_of(config, workdir)
    if processes.is_first():
        newest = checkpoint.origin(folder)
        if newest is not None and models.read_origin(out) == newest:
            _LOG.info("%s holds the model of step %d already", out, newest["step"])
        else:
            # One process writes, with its own devices; the others wait.
            source = models.resolve(config.model.source)
            model = models.load_config(source)
            backend = backends.for_preparing(model, config.parallel)
            abstract = abstract_params(model, jnp.dtype(config.model.param_dtype))
            params, step = checkpoint.restore_params(folder, backend.abstract_state(abstract))
            origin = checkpoint.origin(folder, step)
            models.save(out, model, params, source_folder=source, origin=origin)
    processes.barrier("export: written")
    return out
