import importlib
import inspect
import pkgutil

import attnpo_jax
from attnpo_jax.runtime.errors import UserError

# Not for a user to mend: work that is saved, errors that others tell of in their own words, and
# what a server's caller is told.
# Those that others catch, and turn into what is told.
OTHERS = {"Preempted", "NotPythonError", "SchemaError", "ApiError", "DryRun"}
OTHERS |= {"Failure", "Unreadable", "_End"}  # of endpoints


def test_the_package_s_errors_are_told_without_a_traceback():
    found = {}
    for module in pkgutil.walk_packages(attnpo_jax.__path__, "attnpo_jax."):
        try:
            imported = importlib.import_module(module.name)
        except UserError as error:
            assert "pip install '.[lm_eval]'" in str(error)  # of an extra that is not there
            continue
        for name, value in vars(imported).items():
            if inspect.isclass(value) and issubclass(value, Exception):
                if value.__module__.startswith("attnpo_jax."):
                    found[name] = value
    assert {name for name, value in found.items() if not issubclass(value, UserError)} == OTHERS
    assert len(found) > 15
