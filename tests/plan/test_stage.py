import json

import huggingface_hub.constants
import jax
import numpy as np
import pytest
from rich.console import Console

from attnpo_jax import cli
from attnpo_jax.config import default_config
from attnpo_jax.plan import programs, report, search, topologies
from attnpo_jax.plan import stage as command
from attnpo_jax.plan.collectives import Collective
from attnpo_jax.plan.lengths import Batching
from attnpo_jax.plan.programs import Compiled, Memory

CONFIG = """
from attnpo_jax.config import default_config

def get_config():
    config = default_config()
    config.model.source = "{source}"
    config.parallel.mesh.data = 2
    config.parallel.mesh.fsdp = -1
    config.train.batch_size = 16
    return config
"""


PMAP = ["--config.parallel.backend=pmap", "--config.parallel.mesh.fsdp=1"]


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """`attnpo plan` of a folder that holds no more than a config.json."""
    monkeypatch.setenv("ATTNPO_CACHE", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": 64,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            }
        )
    )
    file = tmp_path / "x.py"
    file.write_text(CONFIG.format(source=tmp_path))
    yield ["plan", f"--config={file}", "--topology=v5e:2x2"]
    jax.config.update("jax_compilation_cache_dir", before)


def made(name, pairs):
    """A program that computes for a second, sends for half of one, and needs an eighth of it."""
    slice_ = topologies.parse("v5e:2x2")
    links = Collective("all-gather", ("fsdp",), 2, ((8, 8),), 5e9, 5, "layer")
    return Compiled(
        name=name,
        topology=slice_,
        mesh={"data": 2, "fsdp": 2, "tensor": 1},
        places=np.array([[[[0, 0, 0]], [[0, 1, 0]]], [[[1, 0, 0]], [[1, 1, 0]]]]),
        batching=Batching(1, pairs, pairs),
        attention="xla",
        memory=Memory(2**30, 2**31, 2**20, 2**30 + 2**31 + 2**20),
        model_flops=int(4 * 197e12 / 8),
        flops=int(197e12),
        traffic=81.9e9,
        collectives=(links,),
        unknown_loops=(),
        compile_seconds=3.0,
    )


@pytest.fixture
def compiled(monkeypatch):
    """Nothing is compiled; programs are as `made` says."""
    for name, method in {"train": "training", "reference": "reference", "judge": "judge"}.items():
        pairs = 16 if name == "train" else 4
        monkeypatch.setattr(
            programs.Setting, method, lambda self, name=name, pairs=pairs: made(name, pairs)
        )


def run(arguments, capsys):
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_json_adds_up(arguments, compiled, capsys):
    code, out, err = run([*arguments, "--json", "--pairs=3600"], capsys)
    assert code == 0, err
    found = json.loads(out)
    assert (found["topology"], found["chips"], found["pairs"]) == ("v5e:2x2", 4, 3600)
    # 225 steps of 16 pairs and 900 batches of 4 take a second each, on the one host.
    assert found["steps"] == 225
    assert found["hours_at_roofline"] == {"train": 225 / 3600, "reference": 0.25, "judge": 0.25}
    train = found["programs"]["train"]
    assert train["seconds"] == pytest.approx(
        {"compute": 1.0, "memory": 0.1, "interconnect": 0.5, "roofline": 1.0}
    )
    assert (train["limit"], train["mfu_at_roofline"]) == ("compute", pytest.approx(1 / 8))
    assert train["collectives"] == [
        {"kind": "all-gather", "axes": ["fsdp"], "inside_host": True, "times": 5, "bytes": 25e9}
    ]
    assert train["memory"]["peak"] == 2**30 + 2**31 + 2**20
    assert train["memory"]["hbm"] == 2**34


def test_pairs_that_training_draws_count_for_its_steps_alone(arguments, compiled, capsys):
    def planned(*extra):
        code, out, err = run([*arguments, "--json", *extra], capsys)
        assert code == 0, err
        return json.loads(out)

    found = planned("--pairs=3600", "--config.train.pairs=400", "--config.train.epochs=2")
    # 25 batches of 16 an epoch; judge and reference read all pairs, 4 at a time.
    assert (found["pairs"], found["trained_on"], found["steps"]) == (3600, 400, 50)
    assert found["hours_at_roofline"] == {"train": 50 / 3600, "reference": 0.25, "judge": 0.25}
    assert planned("--pairs=3600")["trained_on"] == 3600
    _, out, _ = run([*arguments, "--pairs=3600", "--config.train.pairs=400"], capsys)
    assert "400 pairs, drawn" in " ".join(out.split())
    code, _, err = run([*arguments, "--pairs=300", "--config.train.pairs=400"], capsys)
    assert code == 1 and "config.train.pairs = 400: there are 300 pairs; accepted: at most" in err


def test_scorers_are_said_not_to_be_planned(arguments, compiled, capsys):
    scorers = [
        "--config.prepare.scorers.kind.prefix=Be kind.",
        "--config.prepare.scorers.apart.function=diff",
    ]
    code, out, err = run([*arguments, *scorers, "--json"], capsys)
    assert code == 0, err
    found = json.loads(out)
    # A function takes no pass.
    assert found["scorers_not_planned"] == ["kind"]
    assert "passes of the scorers kind" in found["hours_leave_out"]
    code, out, _ = run([*arguments, *scorers], capsys)
    assert code == 0 and "not planned: kind; each takes a pass" in " ".join(out.split())
    code, out, _ = run([*arguments, "--json"], capsys)
    assert json.loads(out)["scorers_not_planned"] == []


def test_table_has_what_the_json_has(arguments, compiled, capsys, monkeypatch):
    wide = Console(width=200)
    monkeypatch.setattr(command, "Console", lambda: wide)
    code, out, _ = run(arguments, capsys)
    assert code == 0
    for words in ("3.00 GiB of 16.00 GiB", "1.000 s, for compute", "12%", "all-gather"):
        assert words in out
    # The builtin pairs are counted: 112, in 7 steps of 16.
    assert "112" in out and "7" in out


def test_options_reach_the_plan(arguments, compiled, capsys):
    code, out, _ = run(
        [*arguments, "--json", "--row-length", "900", "--response-length=400"], capsys
    )
    assert code == 0
    lengths = json.loads(out)["lengths"]
    assert (lengths["row"], lengths["prompt"], lengths["response"]) == (900, 100, 400)


@pytest.mark.parametrize(
    "extra, code, words",
    [
        (["--topology=v5x:2x2"], 1, "topology 'v5x:2x2': accepted: a TPU chip (v4, v5e, v5p, v6e)"),
        (["--config.parallel.mesh.data=3"], 1, "product of the sizes is 3, which must divide"),
        (PMAP, 1, "'pmap' is not planned; accepted: 'jit'"),
        (["--row-length=9000"], 1, "--row-length=9000: accepted: 3 to 4095"),
        (["--pairs=none"], 2, "--pairs=none; accepted: a number from 1 up"),
        (["--search=yes"], 2, "--search takes no value"),
        (["--workdir=x"], 2, "unknown option --workdir"),
        (["--topolgy=v5e:2x2"], 2, "unknown option --topolgy (did you mean --topology?)"),
        (["--config.model.source=nobody/knows"], 1, "model.source 'nobody/knows'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments, compiled, capsys, monkeypatch, extra, code, words
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found, _, err = run([*arguments, *extra], capsys)
    assert found == code and words in err, err


def test_a_topology_is_needed(arguments, capsys):
    code, _, err = run(arguments[:2], capsys)
    assert code == 2 and "plan needs --topology=v5e:8x8" in err


def test_help_lists_the_options_of_the_command_alone(capsys):
    code, out, _ = run(["plan", "--help"], capsys)
    assert code == 0 and "--topology=" in out and "--workdir" not in out
    assert "--topology" not in run(["train", "--help"], capsys)[1]


def test_without_judged_layers_there_is_no_judge_program(arguments, compiled, capsys):
    none = ["--config.judge.layers=none", "--config.weighting.name=uniform"]
    code, out, err = run([*arguments, *none, "--json"], capsys)
    assert code == 0, err
    assert list(json.loads(out)["programs"]) == ["train", "reference"]
    code, out, _ = run([*arguments, *none], capsys)
    assert code == 0 and "no judge program" in " ".join(out.split())


def test_hours_say_what_they_leave_out(arguments, compiled, capsys):
    def left_out(*extra):
        return json.loads(run([*arguments, "--json", *extra], capsys)[1])["hours_leave_out"]

    assert {"evaluation passes", "preparing data.eval"} < set(left_out())
    assert "evaluation passes" not in left_out("--config.data.eval=")


def test_a_search_needs_no_mesh_that_fits_the_chips(arguments, monkeypatch, capsys):
    monkeypatch.setattr(search, "ranking", lambda setting: [])
    code, out, err = run(
        [*arguments, "--config.parallel.mesh.data=3", "--search", "--json"], capsys
    )
    assert (code, json.loads(out)) == (0, []), err


def test_without_pairs_there_are_no_hours(compiled):
    config = default_config()
    assert command._steps(config, None) is None
    plan = report.Plan(
        "m", topologies.parse("v5e:2x2"), None, (made("judge", 4),), None, None, None
    )
    assert plan.hours() == {}
