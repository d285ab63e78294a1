"""Sampling from a model: what is asked, how tokens are drawn, and the engine that does it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnpo_jax.sampling.engine import Engine
    from attnpo_jax.sampling.responses import Request, Response, Update
    from attnpo_jax.sampling.settings import SamplingSettings, SettingsError

__all__ = ["Engine", "Request", "Response", "SamplingSettings", "SettingsError", "Update"]

_HOMES = {"Engine": "engine"}
_HOMES |= dict.fromkeys(("Request", "Response", "Update"), "responses")
_HOMES |= dict.fromkeys(("SamplingSettings", "SettingsError"), "settings")


def __getattr__(name: str) -> Any:
    # The rules of settings, which configs read, need no JAX.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
