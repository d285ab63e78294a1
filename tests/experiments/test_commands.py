"""The commands that the experiments' pages show are ones that can be given."""

import pathlib
import re
import shlex

import pytest

from attnpo_jax import cli
from attnpo_jax import config as config_lib
from attnpo_jax.sweep.grid import grid
from experiments.where_the_weight_lies import analyse, run

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted((ROOT / "experiments").glob("*/README.md"))


def commands(page: pathlib.Path, beginning: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line[line.index(beginning) :] for line in lines if beginning in line]


def test_attnpo_s_commands_resolve(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [command for page in PAGES for command in commands(page, "attnpo ")]
    assert len(found) >= 9
    for command in found:
        _, name, *arguments = shlex.split(command)
        if name == "evaluate":
            name, *arguments = f"evaluate {arguments[0]}", *arguments[1:]
        options, overrides = cli.parse(name, arguments)
        if options.get("config"):
            config = config_lib.load_config(options["config"], overrides)
            config_lib.validate(config)
        if name == "sweep":
            assert len(grid(config, options["set"], options["variant"])) == 6


@pytest.mark.parametrize("module", [run, analyse])
def test_the_scripts_know_the_options_that_their_page_shows(module, monkeypatch, capsys):
    found = commands(PAGES[-1], module.__name__)
    assert found and PAGES[-1].parent.name == "where_the_weight_lies"
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    known = capsys.readouterr().out
    for command in found:
        for option in re.findall(r"--[\w-]+", command):
            assert f"{option} " in known
