"""`attnpo serve`: the engine behind the calls of OpenAI's API.

This module needs nothing but the package; what it loads needs the extra `serve`.
"""

import importlib.util
from typing import TYPE_CHECKING

from attnpo_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_NEEDED = ("starlette", "uvicorn")


def serve(run: "Run", *, model: str | None = None) -> None:
    """Serves a model, see `stage.serve`.

    Raises:
      UserError: the extra `serve` is not installed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"attnpo serve needs {' and '.join(missing)}: pip install '.[serve]' in a clone"
        )
    from attnpo_jax.generate.server import stage

    stage.serve(run, model=model)
