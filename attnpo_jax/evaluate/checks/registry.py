"""The kinds of checks, by name: `check(response, *, ...) -> bool`, pure functions."""

from attnpo_jax.registry import Registry

registry = Registry("check", ("response",))
register = registry.register
