"""Sampling from a model: what is asked, how tokens are drawn, and the engine that does it."""

from attnpo_jax.sampling.engine import Engine, Request, Response, Update
from attnpo_jax.sampling.settings import SamplingSettings, SettingsError

__all__ = ["Engine", "Request", "Response", "SamplingSettings", "SettingsError", "Update"]
