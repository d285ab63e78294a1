"""Named functions whose keyword-only arguments are their hyperparameters.

Weightings and objectives are both chosen by name in a config, and both take their hyperparameters
as keyword-only arguments. A `Registry` holds such functions, reads the hyperparameters from the
signatures, and checks names and values before anything runs. `load_plugins` imports a user's own
files, so that decorators in them can register more functions.
"""

import dataclasses
import functools
import inspect
import os
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from attnpo_jax.runtime import python_file
from attnpo_jax.runtime.errors import UserError

REQUIRED = inspect.Parameter.empty
"""Stands in `Registry.hyperparameters` for the default of a hyperparameter that has none."""


class RegistryError(UserError):
    """An unknown name, a hyperparameter that does not fit, or a function that cannot register."""


class PluginError(UserError):
    """A plugin file that is missing or fails while it is imported."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NotComputed:
    """Stands where an array would be that nobody has computed: whoever reads it is told so.

    Attributes:
      field: the array's name.
      remedy: what to do about it.
    """

    field: str
    remedy: str

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise RegistryError(f"{self.field} is not computed here: {self.remedy}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    # What arrays are asked for: JAX's own conversion, items, operators.
    __jax_array__ = __array__ = __getitem__ = __iter__ = __len__ = __bool__ = _refuse
    __neg__ = __pos__ = __abs__ = __invert__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


class Registry:
    """Functions of one kind, by name.

    Args:
      kind: what the functions are, for error messages ("weighting", "objective").
      inputs: names of the positional arguments every function of this kind takes.
      accepted_needs: what a function may declare that it needs beyond what its inputs always have.
    """

    options: Mapping[str, str] = types.MappingProxyType({})
    """Hyperparameters that all functions have beside their own, and what they mean."""

    def __init__(self, kind: str, inputs: tuple[str, ...], accepted_needs: tuple[str, ...] = ()):
        self.kind = kind
        self.inputs = inputs
        self.accepted_needs = accepted_needs
        self._functions: dict[str, Callable[..., Any]] = {}
        self._needs: dict[str, tuple[str, ...] | Callable[..., Iterable[str]]] = {}

    def register(
        self,
        function: Callable[..., Any] | None = None,
        *,
        needs: Iterable[str] | Callable[..., Iterable[str]] = (),
    ) -> Callable[..., Any]:
        """Adds a function under its own name; for use as a decorator.

        Running the same definition again (a notebook cell, a reloaded module) replaces it.

        Args:
          function: what to add; None gives the decorator, as in `@register(needs=("...",))`.
          needs: which of `accepted_needs` it reads; what nobody needs is not computed. Or a
            function that takes all hyperparameters by name, and says so.

        Raises:
          RegistryError: the name belongs to a function of another module, the arguments are
            not the positional inputs of this kind followed by keyword-only hyperparameters, or a
            need is not among those accepted.
        """
        if function is None:
            return functools.partial(self.register, needs=needs)
        name = function.__name__
        if not callable(needs):
            needs = self._accepted(name, needs)
        parameters = list(inspect.signature(function).parameters.values())
        positional = [
            p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        variadic = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if variadic or len(positional) != len(self.inputs):
            wanted = ", ".join((*self.inputs, "*", "hyperparameter=default", "..."))
            raise RegistryError(
                f"{self.kind} {name!r} has the signature {inspect.signature(function)}; accepted: "
                f"({wanted}), with keyword-only hyperparameters and no *args or **kwargs"
            )
        known = self._functions.get(name)
        if known is not None and known.__module__ != function.__module__:
            raise RegistryError(
                f"{self.kind} {name!r} of {function.__module__} is already registered by "
                f"{known.__module__}; give it another name"
            )
        self._functions[name] = function
        self._needs[name] = needs
        return function

    def names(self) -> tuple[str, ...]:
        """The registered names, sorted."""
        return tuple(sorted(self._functions))

    def get(self, name: str) -> Callable[..., Any]:
        """The function of that name.

        Raises:
          RegistryError: no such name; the message lists those there are.
        """
        if not isinstance(name, str) or name not in self._functions:
            raise RegistryError(
                f"unknown {self.kind} {name!r}; accepted: {', '.join(self.names())} "
                "(your own: name its file in config.plugins)"
            )
        return self._functions[name]

    def _accepted(self, name: str, needs: Iterable[str]) -> tuple[str, ...]:
        needs = (needs,) if isinstance(needs, str) else tuple(needs)
        if unknown := [need for need in needs if need not in self.accepted_needs]:
            raise RegistryError(
                f"{self.kind} {name!r} needs {', '.join(map(repr, unknown))}; accepted: "
                f"{', '.join(self.accepted_needs) or 'none'}"
            )
        return needs

    def needs(self, name: str, hyperparameters: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """What a function declared that it needs, with some hyperparameters or the defaults.

        Raises:
          RegistryError: no such name.
        """
        values = {**self.hyperparameters(name), **(hyperparameters or {})}
        declared = self._needs.get(name, ())
        return self._accepted(name, declared(**values)) if callable(declared) else declared

    def hyperparameters(self, name: str) -> dict[str, Any]:
        """Hyperparameters of a function and their defaults (`REQUIRED` where there is none).

        Raises:
          RegistryError: no such name.
        """
        parameters = inspect.signature(self.get(name)).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def annotations(self, name: str) -> dict[str, Any]:
        """Annotated types of the hyperparameters that have one.

        Raises:
          RegistryError: no such name.
        """
        hints = typing.get_type_hints(self.get(name))
        return {key: hints[key] for key in self.hyperparameters(name) if key in hints}

    def bind(self, name: str, hyperparameters: Mapping[str, Any]) -> functools.partial:
        """The function with its hyperparameters set; those left out keep their defaults.

        Raises:
          RegistryError: no such name, a hyperparameter the function does not have, or one
            without default that is missing. The message lists what is accepted.
        """
        accepted = self.hyperparameters(name)
        listed = ", ".join(accepted) or "none"
        unknown = [key for key in hyperparameters if key not in accepted]
        if unknown:
            raise RegistryError(
                f"{self.kind} {name!r} has no hyperparameter {', '.join(map(repr, unknown))}; "
                f"accepted: {listed}"
            )
        missing = [
            key
            for key, default in accepted.items()
            if default is REQUIRED and key not in hyperparameters
        ]
        if missing:
            raise RegistryError(
                f"{self.kind} {name!r} needs a value for {', '.join(map(repr, missing))}; "
                f"its hyperparameters: {listed}"
            )
        return functools.partial(self.get(name), **hyperparameters)


_loaded_plugins: dict[pathlib.Path, types.ModuleType] = {}


def load_plugins(files: Iterable[str | os.PathLike]) -> list[types.ModuleType]:
    """Imports Python files that register weightings or objectives, each once per process.

    Args:
      files: paths; relative ones count from the current directory.

    Returns:
      The imported modules, in the order of `files`.

    Raises:
      PluginError: a file does not exist or raises while it is imported; the message names it.
    """
    modules = []
    for file in files:
        path = pathlib.Path(file).expanduser().resolve()
        if path not in _loaded_plugins:
            _loaded_plugins[path] = _import_file(path)
        modules.append(_loaded_plugins[path])
    return modules


def has_loaded(file: str | os.PathLike) -> bool:
    """Whether this process has run a plugin already."""
    return pathlib.Path(file).expanduser().resolve() in _loaded_plugins


def _import_file(path: pathlib.Path) -> types.ModuleType:
    if not path.is_file():
        raise PluginError(f"plugin {path}: no such file")
    try:
        return python_file.load(path)
    except python_file.NotPythonError as error:
        raise PluginError(f"plugin {error}") from error
    except Exception as error:
        raise PluginError(f"plugin {path}: {type(error).__name__}: {error}") from error
