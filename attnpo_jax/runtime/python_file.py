"""Users' own Python files: imported under a name of their own."""

import hashlib
import importlib.util
import pathlib
import sys
import traceback
import types


class NotPythonError(ImportError):
    """A file whose name does not end in .py."""


def load(path: pathlib.Path) -> types.ModuleType:
    """Imports a file.

    Raises:
      NotPythonError: its name does not end in .py.
      Exception: what the file raises.
    """
    # The digest keeps two files of the same name in different folders apart.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"attnpo_file_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise NotPythonError(f"{path}: not a Python file (accepted: a path ending in .py)")
    module = importlib.util.module_from_spec(spec)
    # Where pickle and dataclasses look for what it defines.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def place(path: pathlib.Path, error: BaseException) -> str:
    """`FILE:LINE` of the last line of that file that an error passed through, or `FILE`."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
    return f"{path}:{lines[-1]}" if lines else str(path)
