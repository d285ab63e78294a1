"""Every code block of README.md is run or, where it would train, resolved to a valid config."""

import io
import pathlib
import re
import shlex
from contextlib import redirect_stdout

import jax.numpy as jnp
import pytest
from ml_collections import config_dict

from attnpo_jax import cli, losses, registry, weighting
from attnpo_jax import config as config_lib
from attnpo_jax.sweep.grid import grid

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
PYTHON = [text for language, text in BLOCKS if language == "python"]
BASH = [text.strip() for language, text in BLOCKS if language == "bash"]
(API,) = (text for text in PYTHON if "judge_pairs" in text)
# Blocks that are files begin with the file's name.
FILES = {
    match[1]: text for text in PYTHON if (match := re.match(r"# (\w+\.py)\n", text)) is not None
}
INSTALL, TEST, *COMMANDS = BASH
SETUP = "python3 -m venv .venv && .venv/bin/pip install "


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """What these tests register is gone when they end."""
    for module in (weighting, losses):
        functions = dict(module.registry._functions)
        monkeypatch.setattr(module.registry, "_functions", functions)
    monkeypatch.setattr(registry, "_loaded_plugins", {})


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the configs and the files that the README shows, as current directory."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)


def resolved(command: str) -> config_dict.ConfigDict:
    """The validated config that an `attnpo` command line stands for."""
    _, name, *arguments = shlex.split(command)
    assert name in cli.COMMANDS
    (file,) = (a.removeprefix("--config=") for a in arguments if a.startswith("--config="))
    assert any(a.startswith("--workdir=") for a in arguments)
    config = config_lib.load_config(file, [a for a in arguments if a.startswith("--config.")])
    config_lib.validate(config)
    return config


def test_every_block_is_covered_here():
    languages = [language for language, _ in BLOCKS]
    assert set(languages) == {"bash", "python", "text"}
    assert len(PYTHON) == 1 + len(FILES)
    assert set(FILES) == {"my_config.py", "decay.py"}
    names = ["generate", "evaluate", "run", "sweep"]
    assert [command.split()[1] for command in COMMANDS] == names


def test_two_commands_set_up_a_fresh_machine(checkout):
    assert INSTALL.startswith(SETUP + ". && ")
    parts = [part.strip() for part in INSTALL.replace("\\\n", "").split(" && ")]
    probe, quickstart = parts[2:]
    assert quickstart.startswith(".venv/bin/attnpo run ")
    assert resolved(quickstart).model.source == "smollm2-135m-instruct"
    # The probe is of the same workdir, so that the report that the run ends with has it.
    assert probe == quickstart.replace("attnpo run", "attnpo probe")
    assert resolved(quickstart).report.enabled and resolved(probe) == resolved(quickstart)
    assert TEST == SETUP + "-e '.[test]' && .venv/bin/python -m pytest -n 2 --dist loadfile"


def test_ci_runs_what_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text()
    assert "\npip install -e '.[test]' " in script
    assert "\npython -m pytest -n 2 --dist loadfile ||" in script


def test_api_block_judges_a_pair_and_shows_weights(smollm2_folder):
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(API, "README.md", "exec"), {})
    verdict, *responses = printed.getvalue().strip().splitlines()
    # What the README shows, to the digits that float32 on another machine keeps.
    shown = next(text for language, text in BLOCKS if language == "text").strip().splitlines()
    for line, expected in zip([verdict, *responses], shown, strict=True):
        number = re.compile(r"-?\d+\.\d+")
        assert number.sub("", line).split() == number.sub("", expected).split()
        found, wanted = ([float(n) for n in number.findall(text)] for text in (line, expected))
        assert found == pytest.approx(wanted, abs=0.02)


def test_config_block_is_valid(checkout):
    config = config_lib.load_file("my_config.py")
    config_lib.validate(config)
    assert config.objective.name == "ipo" and config.weighting.layer == (-2, -1)
    # A 30-layer model keeps both layers that the weighting asks for.
    assert config_lib.check_layers(config, 30) == (28, 29)


def test_sampling_commands(checkout):
    workdir = re.search(r"--workdir=(\S+)", INSTALL)[1]
    block = next(c for c in COMMANDS if c.startswith("attnpo generate"))
    for command, model in zip(block.strip().splitlines(), (None, "base"), strict=True):
        options, overrides = cli.parse("generate", shlex.split(command)[2:])
        assert (options.get("model"), options["workdir"]) == (model, workdir)
        config = config_lib.load_config(options["config"], overrides)
        config_lib.validate(config)
        assert (config.generate.temperature, config.generate.max_new_tokens) == (0, 48)


def test_evaluation_commands(checkout):
    workdir = re.search(r"--workdir=(\S+)", INSTALL)[1]
    block = next(c for c in COMMANDS if c.startswith("attnpo evaluate"))
    checks, report = (shlex.split(line)[1:] for line in block.strip().splitlines())
    options, overrides = cli.parse(" ".join(checks[:2]), checks[2:])
    assert (options["name"], options["workdir"]) == ("short", workdir)
    config = config_lib.load_config(options["config"], overrides)
    config_lib.validate(config)
    assert (config.evaluate.checks.count, config.evaluate.checks.max_new_tokens) == (24, 48)
    options, _ = cli.parse(" ".join(report[:2]), report[2:])
    assert options == {"workdirs": workdir}


def test_variant_block_and_its_command(checkout):
    command = next(c for c in COMMANDS if c.startswith("attnpo run"))
    config = resolved(command)
    assert dict(config.weighting.items()) == {"name": "decay", "gamma": 0.95}
    mask = jnp.array([[True, True, True, False]])
    zeros = jnp.zeros((1, 4))
    response = weighting.ResponseTokens(
        mask_BT=mask,
        text_mask_BT=mask,
        judge_B2ST=jnp.zeros((1, 2, 1, 4)),
        verdict_B2=jnp.zeros((1, 2)),
        reference_logps_BT=zeros,
        policy_logps_BT=zeros,
        is_chosen=jnp.array([True]),
    )
    weigh = config_lib.bind_section(weighting, config.weighting)
    assert weigh(response)[0].tolist() == pytest.approx([1.0, 0.95, 0.9025, 0.0])


def test_sweep_command(checkout):
    command = next(c for c in COMMANDS if c.startswith("attnpo sweep"))
    options, overrides = cli.parse("sweep", shlex.split(command)[2:])
    points = grid(config_lib.load_config(options["config"], overrides), options["set"])
    assert [point.group for point in points] == ["uniform", "attention"] * 3


def test_links_lead_somewhere():
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"
