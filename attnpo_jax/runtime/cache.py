"""The folder of what is kept between runs: fetched models, compiled programs."""

import logging
import os
import pathlib

CACHE_VARIABLE = "ATTNPO_CACHE"


def default_cache_dir() -> pathlib.Path:
    """`$ATTNPO_CACHE` when set, else `~/.cache/attnpo_jax`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return pathlib.Path(chosen or "~/.cache/attnpo_jax").expanduser()


def keep_compiled_programs() -> None:
    """Keeps compiled programs between runs, where `$JAX_COMPILATION_CACHE_DIR` says or here."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        folder = default_cache_dir() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logging.getLogger("attnpo_jax").warning(
                "compiled programs are not kept (%s); $JAX_COMPILATION_CACHE_DIR or $%s may name a "
                "folder that can be written",
                error,
                CACHE_VARIABLE,
            )
            return
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
