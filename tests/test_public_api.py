import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import attnpo_jax

NAMES = [name for name in attnpo_jax.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_is_there_and_documented(name):
    value = getattr(attnpo_jax, name)
    assert inspect.getdoc(value)
    if not inspect.ismodule(value):
        assert value.__name__ == name
        # Documented itself, not by a base class or by what dataclass writes.
        assert value.__doc__ and not value.__doc__.startswith(f"{name}(")


def test_all_lists_every_public_name_once():
    assert sorted(NAMES) == sorted((*attnpo_jax._MODULES, *attnpo_jax._HOMES))
    assert set(attnpo_jax.__all__) <= set(dir(attnpo_jax))


@pytest.mark.process
def test_names_of_stages_are_modules_whatever_was_imported_first():
    # In a process of its own: imports here may have set the attribute already.
    code = """
import sys
for name in ("prepare", "run", "export", "judge", "config"):
    for module in [one for one in sys.modules if one.partition(".")[0] == "attnpo_jax"]:
        del sys.modules[module]
    found = {}
    exec(f"from attnpo_jax import Judge, {name}; import attnpo_jax.run, attnpo_jax", found)
    module = found[name]
    assert getattr(found["attnpo_jax"], name) is module, name
    assert module.__name__ == f"attnpo_jax.{name}", name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'attnpo_jax' has no attribute 'train_on'"):
        _ = attnpo_jax.train_on
    with pytest.raises(ImportError):
        exec("from attnpo_jax import train_on")


def test_importing_the_package_imports_no_library():
    code = """
import sys
import attnpo_jax
dir(attnpo_jax)
heavy = {"jax", "numpy", "datasets", "transformers", "ml_collections"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.process
def test_public_names_need_no_torch():
    code = f"""
import sys
sys.modules["torch"] = None  # any import of torch fails
import attnpo_jax, attnpo_jax.train.loop
for name in {NAMES}:
    getattr(attnpo_jax, name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(pathlib.Path(attnpo_jax.__file__).read_text())
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    homes = {name: f"attnpo_jax.{home}" for name, home in attnpo_jax._HOMES.items()}
    assert seen == homes | dict.fromkeys(attnpo_jax._MODULES, "attnpo_jax")
