import ast
import pathlib

import pytest

from attnpo_jax import config as config_lib

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_is_valid_and_its_header_says_how_to_run_it(file):
    config = config_lib.load_file(str(file))
    config_lib.validate(config)
    assert config.is_locked
    header = ast.get_docstring(ast.parse(file.read_text()))
    name = file.relative_to(FOLDER.parent)
    assert f"attnpo run --config={name} --workdir=" in header


def test_dpo_differs_from_the_quickstart_in_the_weighting_alone():
    quickstart, dpo = (config_lib.load_file(str(FOLDER / f"{n}.py")) for n in ("quickstart", "dpo"))
    changed = config_lib.diff(quickstart, dpo)
    assert changed["weighting.name"] == ("attention", "uniform")
    assert {field.split(".")[0] for field in changed} == {"weighting"}
