import copy
import doctest
import re
import subprocess
import sys

import pytest
from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax import losses, weighting
from attnpo_jax.config import (
    ConfigError,
    bind_section,
    check_layers,
    checks,
    complete_sections,
    default_config,
    diff,
    files,
    flatten,
    from_json,
    layers,
    load_config,
    load_file,
    reads,
    section_for,
    source_layers,
    to_json,
    validate,
)
from attnpo_jax.config.fields import DECISIVE, FIELDS, SECTION_FIELDS
from attnpo_jax.registry import RegistryError
from attnpo_jax.runtime import nested

PLUGIN = """
from attnpo_jax import weighting

@weighting.register
def {name}(response, *, gamma: float, floor=0.25, mode: str = "all"):
    return response.mask_BT * gamma
"""


@pytest.fixture
def plugin(tmp_path):
    """A weighting under a name no other test uses, and its file."""
    name = f"decay_{abs(hash(tmp_path))}"
    file = tmp_path / "decay.py"
    file.write_text(PLUGIN.format(name=name))
    return name, str(file)


ATTENTION = {
    "layer": -1,
    "fix_sink": True,
    "layers": "mean",
    "order": "mean",
    "renormalize": True,
}


def with_value(field, value):
    """The default config with one field set, past ConfigDict's own type check."""
    config = default_config().to_dict()
    *parents, last = field.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[last] = value
    return config_dict.ConfigDict(config)


def test_default_config_is_valid_locked_and_the_paper_s():
    config = default_config()
    validate(config)
    assert config.weighting.to_dict() == {"name": "attention"} | ATTENTION
    assert config.objective.to_dict() == {
        "name": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "divergence": "reverse_kl",
        "alpha": 0.5,
        "wpo": False,
    }
    assert (config.data.max_length, config.data.max_prompt_length) == (2048, 1800)
    assert (config.optim.learning_rate, config.optim.warmup_ratio) == (1e-6, 0.1)
    with pytest.raises(AttributeError, match="lerning_rate"):
        config.optim.lerning_rate = 1.0


def test_the_default_config_is_the_table_of_fields():
    flat = flatten(default_config())
    values = {f: v for f, v in flat.items() if f.split(".")[0] not in config_lib.SECTIONS}
    assert values == {name: field.default for name, field in FIELDS.items()}
    assert SECTION_FIELDS == tuple(config_lib.SECTIONS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_accepts_its_default_and_refuses_what_no_field_can_mean(field):
    assert FIELDS[field].rule.accepts(FIELDS[field].default)
    assert not FIELDS[field].rule.accepts(object())


def test_what_decides_a_run_s_course():
    assert set(DECISIVE) == {
        "seed",
        "model.dtype",
        "model.param_dtype",
        "data.shuffle",
        "weighting",
        "objective",
        "lora.rank",
        "lora.alpha",
        "lora.targets",
        "reference.source",
        "shaping.top_share",
        "shaping.smooth",
        "shaping.normalize",
        "shaping.floor",
        "shaping.mix",
        "optim.learning_rate",
        "optim.schedule",
        "optim.warmup_ratio",
        "optim.b1",
        "optim.b2",
        "optim.eps",
        "optim.weight_decay",
        "optim.max_grad_norm",
        "train.batch_size",
        "train.epochs",
        "train.pairs",
        "train.steps",
    }


def test_remat_choices_are_the_decoder_s():
    from attnpo_jax.models.decoder import REMAT_POLICIES

    for name in REMAT_POLICIES:
        validate(with_value("model.remat", name))


@pytest.mark.parametrize(
    "field, value, accepted",
    [
        ("seed", -1, "a whole number from 0 to"),
        ("seed", 2**63, "a whole number from 0 to 9,223,372,036,854,775,807"),
        ("plugins", 3, "a Python file or a tuple of them, or none"),
        ("model.source", "a\0b", "a text that is not empty"),
        ("model.chat_template", "a\0b", "None or an existing file"),
        ("model.chat_template", "a" * 5000, "None or an existing file"),
        ("data.train", "a\ud800", "a source, or a tuple of sources"),
        ("data.num_buckets", 99999999999, "a whole number from 1 to 1,000"),
        ("lora.targets", {}, "or a tuple of projections"),
        ("lora.targets", ({},), "or a tuple of projections"),
        ("lora.targets", {"q_proj"}, "or a tuple of projections"),
        ("lora.alpha", 10**400, "a number above 0"),
        ("optim.weight_decay", 1e39, "a number, 0 or more"),
        ("train.steps", 10**21, "a whole number from 0 to 100,000,000"),
        ("train.epochs", 99999999999, "a whole number from 1 to 100,000"),
        ("model.source", " ", "a text that is not empty"),
        ("model.dtype", "float16", "'float32', 'bfloat16'"),
        ("model.chat_template", "absent.jinja", "None or an existing file"),
        ("data.train", "", "a source, or a tuple of sources"),
        ("data.train", ("a.jsonl", 3), "all of them or none with a share"),
        ("data.train", ("a.jsonl*0.5", "b.jsonl"), "all of them or none with a share"),
        ("data.weight_columns", (1.5,), "'all', a column's name or a tuple of them, or none"),
        ("data.max_length", 2048.0, "a whole number from 2 to"),
        ("data.shuffle", 1, "True or False"),
        ("data.on_bad_row", "ignore", "'error', 'skip'"),
        ("judge.template", "absent.txt", "'default' or an existing file"),
        ("judge.layers", "half", "'none', or 'quartiles', 'all', a layer's number, a head as "),
        ("judge.layers", (), "'none', or 'quartiles', 'all', a layer's number, a head as '23:4'"),
        ("judge.layers", (0, "none"), "'none', or 'quartiles', 'all', a layer's number, a head"),
        ("judge.layers", ("2:",), "a layer's number, a head as '23:4', 'rollout', or a tuple of"),
        ("judge.heads", 4, "'mean', 'all'"),
        ("optim.learning_rate", float("nan"), "a number above 0"),
        ("optim.learning_rate", 0.0, "a number above 0"),
        ("optim.warmup_ratio", 1.1, "a number from 0 to 1"),
        ("optim.b2", 1.0, "a number from 0 to 1, 1 excluded"),
        ("optim.schedule", "cosin", "'cosine', 'linear', 'constant'"),
        ("train.batch_size", True, "a whole number from 1 to"),
        ("train.checkpoint_dir", "s3://bucket/run", "'', a folder, or gs://BUCKET/FOLDER"),
        ("parallel.mesh.fsdp", 0, "a whole number from 1 to 1,000,000, or -1"),
        ("plugins", ("absent.py",), "no such file"),
        ("train.microbatch_size", 5, "a divisor of config.train.batch_size = 32"),
        ("data.max_prompt_length", 2048, "less than config.data.max_length = 2048"),
        ("judge.max_answer_length", 1024, "less than half of config.judge.max_length = 2048"),
        ("parallel.mesh.tensor", -1, "-1 for at most one of them"),
        ("weighting.layer", 1.5, "int | str | tuple[int | str, ...]"),
        ("weighting.layer", (1, 2.5), "int | str | tuple[int | str, ...]"),
        ("weighting.fix_sink", 1, "True or False"),
        ("weighting.tau", 1, "no such hyperparameter; accepted: layer, fix_sink"),
        ("weighting.name", "atention", "accepted: attention, "),
        ("objective.name", None, "accepted: "),
        ("objective.name", ["a"], "accepted: "),
        ("objective.beta", 0, "a number above 0"),
        ("objective.label_smoothing", 0.5, "a number from 0 to 0.5, 0.5 excluded"),
        ("objective.divergence", "kl", "'reverse_kl', 'forward_kl', 'js', 'alpha'"),
        ("objective.alpha", 0, "a number above 0"),
        ("objective.wpo", "clamp", "False, True, 'clamped'"),
    ],
)
def test_a_bad_value_is_named_with_what_is_accepted(field, value, accepted):
    with pytest.raises(ConfigError) as caught:
        validate(with_value(field, value))
    (problem,) = caught.value.problems
    assert f"config.{field}" in problem and accepted in problem
    if field != "plugins":
        assert repr(value) in problem


@pytest.mark.parametrize(
    "field, value",
    [
        ("data.train", ("a.jsonl", "owner/name@train[:10]")),
        ("data.train", ["a.jsonl"]),
        ("data.eval", ""),
        ("judge.layers", (0, -1)),
        ("judge.layers", "all"),
        ("judge.layers", -1),
        ("judge.layers", "rollout"),
        ("judge.layers", ("quartiles", "-1:3", 7, "rollout")),
        ("weighting.layer", "rollout"),
        ("weighting.layer", ("23:4", -1)),
        ("weighting.layer", (0, -1)),
        ("objective.beta", 1),
        ("objective.wpo", "clamped"),
        ("optim.warmup_ratio", 0),
        ("optim.max_grad_norm", 0.0),
        ("parallel.mesh.data", 8),
    ],
)
def test_good_values_pass(field, value):
    validate(with_value(field, value))


def test_unknown_and_missing_fields_are_named():
    config = default_config()
    with config.unlocked():
        config.optim.batch_size = 8
        config.model.sorce = "x"
        del config.train.epochs
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert set(caught.value.problems) == {
        "config.model.sorce = 'x': unknown field (did you mean config.model.source?)",
        "config.optim.batch_size = 8: unknown field "
        "(did you mean config.judge.batch_size or config.train.batch_size?)",
        "config.train.epochs: missing",
    }


def test_all_problems_are_listed_at_once():
    config = with_value("seed", -1)
    config.optim.schedule = "step"
    config.objective.beta = -0.1
    with pytest.raises(ConfigError, match="3 problems in the config") as caught:
        validate(config)
    assert len(caught.value.problems) == 3
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_pmap_takes_data_parallelism_only():
    config = default_config()
    config.parallel.backend = "pmap"
    validate(config)
    config.parallel.mesh.fsdp = 2
    with pytest.raises(ConfigError, match=r"mesh.fsdp = 2: accepted: 1, since .*'pmap'"):
        validate(config)


def test_writers_need_their_package(monkeypatch):
    config = default_config()
    config.log.wandb = True
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"config.log.wandb = True: .*pip install '\.\[wandb\]'"):
        validate(config)


def test_a_bucket_needs_its_package(monkeypatch):
    config = default_config()
    config.train.checkpoint_dir = "gs://bucket/run"
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'gs://bucket/run': needs the package gcsfs"):
        validate(config)


def objective_problems(name, **values):
    config = default_config()
    config.objective = section_for(losses, name, **values)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    return list(caught.value.problems)


def test_an_objective_s_hyperparameters_are_checked_together_and_term_by_term():
    (problem,) = objective_problems("exo", label_smoothing=0.0)
    assert problem == (
        "config.objective.label_smoothing = 0.0: accepted: a number above 0, below 0.5"
    )
    (problem,) = objective_problems("mixture", terms="sigmoid + dpo")
    assert problem.startswith("config.objective: unknown objective 'dpo'; accepted: apo_down, ")
    terms = "2 * sigmoid(beta=-1.0, wpo=True) + exo(label_smoothing='a')"
    assert objective_problems("mixture", terms=terms) == [
        "config.objective.terms: sigmoid(beta=-1.0): accepted: a number above 0",
        "config.objective.terms: exo(label_smoothing='a'): accepted: a number above 0, below 0.5",
    ]
    config = default_config()
    config.objective = section_for(losses, "mixture", terms="sigmoid(beta=0.05) + nll", wpo=True)
    validate(config)


def test_margins_need_an_objective_that_reads_them():
    config = default_config()
    config.data.fields.margin = "gap"
    validate(config)
    config.objective = section_for(losses, "nca")
    with pytest.raises(ConfigError) as caught:
        validate(config)
    (problem,) = caught.value.problems
    assert problem.startswith("config.data.fields.margin = 'gap': 'nca' reads no margin; accepted:")
    assert "one of cpo, discopop, dpop, exo, hinge, mixture, orpo, " in problem


@pytest.mark.parametrize(("name", "values"), [("tdpo", {}), ("mixture", {"terms": "tdpo + nll"})])
def test_the_reference_s_distribution_costs_a_copy_that_has_to_be_asked_for(name, values):
    config = default_config()
    config.objective = section_for(losses, name, **values)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"config.objective.name = {name!r} reads the reference's distribution"
    )
    assert "config.reference.in_memory = False: accepted: True, which holds a second set" in problem
    config.lora.rank = 4
    validate(config)  # adapters have their base
    config.reference.source = "some/other"
    with pytest.raises(ConfigError, match="reference.in_memory"):
        validate(config)
    config.reference.in_memory = True
    validate(config)


@pytest.mark.parametrize(
    ("objective", "weighs", "read"),
    [
        ("sigmoid", {"name": "attention"}, {"judge", "reference_logps"}),
        ("sigmoid", {"name": "uniform"}, {"reference_logps"}),
        ("simpo", {"name": "attention"}, {"judge"}),
        ("orpo", {"name": "confpo"}, set()),
        ("cpo", {"name": "reference_surprisal"}, {"reference_logps"}),
        ("simpo", {"name": "reference_entropy"}, {"reference_entropy"}),
        ("simpo", {"name": "sepo", "column": "oracle"}, {"reference_logps"}),
        ("simpo", {"name": "sepo", "column": "oracle", "against": "start"}, set()),
    ],
)
def test_what_weighting_and_objective_read_of_the_passes(objective, weighs, read):
    config = default_config()
    config.objective = section_for(losses, objective)
    config.weighting = section_for(weighting, **weighs)
    assert set(reads(config)) == read
    config.judge.layers = "none"
    assert set(reads(config)) == read - {"judge"}
    mixed = default_config()
    mixed.objective = section_for(losses, "mixture", terms="simpo + 0.5 * nll")
    assert reads(mixed) == ("judge",)


def test_section_for_takes_fields_from_the_signature():
    section = section_for(weighting, "attention", layer=(0, 14))
    assert section.to_dict() == {"name": "attention"} | ATTENTION | {"layer": (0, 14)}
    section.layer = 3  # one layer or several: both types are fine
    with pytest.raises(RegistryError, match="no hyperparameter 'tau'; accepted: beta"):
        section_for(losses, "hinge", tau=1.0)
    assert bind_section(losses, section_for(losses, "ipo", beta=0.5)).keywords == {
        "beta": 0.5,
        "length_normalize": False,
    }


def test_switching_a_section_resets_it_to_the_new_function_s_defaults():
    config = default_config()
    config.objective.beta = 0.005
    complete_sections(config, objective="ipo", weighting="uniform")
    assert config.objective.to_dict() == {
        "name": "ipo",
        "beta": 0.1,
        "length_normalize": False,
        "wpo": False,
    }
    assert config.weighting.to_dict() == {"name": "uniform"}
    validate(config)
    with pytest.raises(ConfigError, match="config.objective.name: unknown objective 'dpo'"):
        complete_sections(config, objective="dpo")


def test_a_name_that_a_config_file_sets_resets_the_section():
    config = default_config()
    config.objective.label_smoothing = 0.2
    config.objective.name = "ipo"
    assert config.objective.to_dict() == {
        "name": "ipo",
        "beta": 0.1,
        "length_normalize": False,
        "wpo": False,
    }
    config.objective.length_normalize = True
    config.objective.name = "ipo"  # no other name, no reset
    assert config.objective.length_normalize is True
    with pytest.raises(AttributeError, match="bta"):
        config.objective.bta = 1.0
    copied = copy.deepcopy(config).copy_and_resolve_references()
    assert copied.objective.to_dict() == config.objective.to_dict()
    validate(copied)


SIMPO = """
from attnpo_jax import losses

@losses.register
def {name}(chosen, rejected, *, beta: float = 2.0, gamma: float = 0.5):
    return -beta * (chosen.policy_B - rejected.policy_B) + gamma
"""
USES = """
from attnpo_jax.config import default_config

def get_config():
    config = default_config()
    config.objective.beta = 0.05
    {more}
    return config
"""


@pytest.fixture
def simpo(tmp_path, monkeypatch):
    """An objective whose beta is 2 by default, its file, and what writes a config's file."""
    monkeypatch.setattr(losses.registry, "_functions", dict(losses.registry._functions))
    name = f"simpo_{tmp_path.name}".replace("-", "_")
    plugin = tmp_path / "simpo_plugin.py"
    plugin.write_text(SIMPO.format(name=name))

    def write(more="pass"):
        file = tmp_path / "simpo_config.py"
        file.write_text(USES.format(more=more))
        return str(file)

    return name, str(plugin), write


def test_a_plugin_s_objective_starts_from_its_own_beta(simpo, caplog):
    caplog.set_level("INFO", "attnpo_jax")
    name, plugin, write = simpo
    file = write()
    arguments = [f"--config.plugins={plugin}", f"--config.objective.name={name}"]
    config = load_config(file, arguments)
    assert config.objective.to_dict() == {"name": name, "beta": 2.0, "gamma": 0.5, "wpo": False}
    said = f"config.objective: {name!r} in place of 'sigmoid', whose values are dropped: "
    assert caplog.messages == [
        said + "beta = 2.0 (default), gamma = 0.5 (default), wpo = False (default)"
    ]
    caplog.clear()
    # What the command line sets is kept, whatever its place.
    config = load_config(file, ["--config.objective.gamma=0.3", *arguments])
    assert config.objective.to_dict() == {"name": name, "beta": 2.0, "gamma": 0.3, "wpo": False}
    assert caplog.messages == [
        said + "beta = 2.0 (default), gamma = 0.3 (set), wpo = False (default)"
    ]


def test_a_config_file_names_a_plugin_s_objective_before_it_is_loaded(simpo, caplog):
    caplog.set_level("INFO", "attnpo_jax")
    name, plugin, write = simpo
    begins = f"config.plugins = ({plugin!r},); config.objective.name = {name!r}; "
    file = write(begins + "config.objective.gamma = 0.25")
    config = load_config(file)
    assert config.objective.to_dict() == {"name": name, "beta": 2.0, "gamma": 0.25, "wpo": False}
    assert config.objective.is_locked
    assert caplog.messages[0].endswith("gamma = 0.25 (set), wpo = False (default)")
    # The same name on the command line is no switch: the file's values stay.
    config = load_config(file, [f"--config.objective.name={name}"])
    assert config.objective.gamma == 0.25


def test_a_mistyped_field_of_a_plugin_that_is_not_loaded_yet_is_reported(simpo):
    name, plugin, write = simpo
    begins = f"config.plugins = ({plugin!r},); config.objective.name = {name!r}; "
    config = load_config(write(begins + "config.objective.gama = 0.25"))
    with pytest.raises(ConfigError, match="objective.gama = 0.25: .*accepted: beta, gamma"):
        validate(config)


@pytest.mark.parametrize(
    "override, value",
    [
        ("evaluate.names=pairs,checks", ("pairs", "checks")),
        ("evaluate.names=pairs, checks,", ("pairs", "checks")),
        ("evaluate.names=('pairs','checks')", ("pairs", "checks")),
        ("evaluate.names=pairs", "pairs"),
        ("evaluate.names='a,b'", "a,b"),
        ("train.evaluations.names=pairs,versus", ("pairs", "versus")),
        ("evaluate.harness.tasks=arc_easy,piqa", ("arc_easy", "piqa")),
        ("lora.targets=q_proj,v_proj", ("q_proj", "v_proj")),
        ("data.train=a.jsonl*0.7,b.jsonl*0.3", ("a.jsonl*0.7", "b.jsonl*0.3")),
        ("data.weight_columns=31,rollout", (31, "rollout")),
        ("judge.layers=-1,23:4,rollout", (-1, "23:4", "rollout")),
        ("weighting.layer=-1,rollout", (-1, "rollout")),
        # Longer than the name of a file may be.
        (f"evaluate.names={'x' * 5000},checks", ("x" * 5000, "checks")),
        # One text each, whatever is in it.
        ("model.source=a,b", "a,b"),
        ("generate.stop=a,b", "a,b"),
        ("iterate.prompts=a,b", "a,b"),
    ],
)
def test_names_with_commas_between_them_are_several(override, value):
    field = override.partition("=")[0]
    config = load_config(None, [f"--config.{override}"])
    assert config_lib.flatten(config)[field] == value


def test_commas_part_plugins_but_not_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one.py", "two.py", "a,b.py"):
        (tmp_path / name).write_text("")
    for given, found in [("one.py,two.py", ("one.py", "two.py")), ("a,b.py", ("a,b.py",))]:
        assert tuple(load_config(None, [f"--config.plugins={given}"]).plugins) == found


def test_names_of_a_plugin_s_hyperparameter_may_have_commas_between_them(tmp_path, monkeypatch):
    monkeypatch.setattr(weighting.registry, "_functions", dict(weighting.registry._functions))
    plugin = tmp_path / "several.py"
    plugin.write_text(
        "from attnpo_jax import weighting\n"
        "@weighting.register\n"
        "def of_several(response, *, columns: tuple[str, ...] = (), mode: str = 'a'):\n"
        "    return response.mask_BT\n"
    )
    given = ["plugins=" + str(plugin), "weighting.name=of_several", "weighting.columns=a,b"]
    config = load_config(None, [f"--config.{one}" for one in (*given, "weighting.mode=a,b")])
    assert config.weighting.columns == ("a", "b")
    assert config.weighting.mode == "a,b"


def test_a_run_s_config_json_is_a_config(tmp_path):
    config = default_config()
    config.objective.name = "ipo"
    config.objective.beta = 0.02
    config.judge.layers = (0, -1)
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    assert diff(config, load_config(str(file))) == {}
    changed = load_config(str(file), ["--config.train.steps=3", "--config.objective.name=hinge"])
    assert diff(config, changed) == {
        "train.steps": (0, 3),
        "objective.name": ("ipo", "hinge"),
        "objective.beta": (0.02, 0.1),
        "objective.length_normalize": (False, files.ABSENT),
    }
    assert "length_normalize" not in changed.objective
    with pytest.raises(ConfigError, match=r"config.json is JSON, which takes no argument"):
        load_config(f"{file}:small")


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "not a config in JSON: Expecting property name.*line 1"),
        ("[1]", "not a config in JSON: holds a list; accepted: an object"),
        ('{"seed": "x"}', "config.seed = 'x': "),
        ('{"objective": "ipo"}', "config.objective = 'ipo': accepted: an object with a name"),
        ('{"optim": {"momentum": 0.9}}', "config.optim.momentum = 0.9: no config has this"),
        ("\xff", "not a config in JSON: 'utf-8' codec"),
    ],
)
def test_a_json_file_that_is_no_config_is_named(tmp_path, text, said):
    file = tmp_path / "c.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=f"{file}: {said}"):
        load_config(str(file))


def test_completing_fills_in_defaults_and_keeps_unknown_fields_for_validate():
    config = default_config()
    with config.unlocked():
        config.objective = config_dict.ConfigDict({"name": "ipo", "bet": 0.2})
    complete_sections(config)
    assert config.objective.length_normalize is False and config.objective.bet == 0.2
    with pytest.raises(ConfigError, match="config.objective.bet = 0.2: .*accepted: beta, length_n"):
        validate(config)


def test_plugin_functions_are_validated_by_their_signature(plugin):
    name, file = plugin
    config = default_config()
    config.plugins = (file,)
    complete_sections(config, weighting=name)
    assert config.weighting.to_dict() == {
        "name": name,
        "gamma": None,
        "floor": 0.25,
        "mode": "all",
    }
    with pytest.raises(ConfigError, match="config.weighting.gamma: .* needs a value for it"):
        validate(config)
    config.weighting.gamma = 0.9
    config.weighting.floor = 1  # no annotation: any number
    validate(config)
    config.weighting.gamma = "high"
    with pytest.raises(ConfigError, match="config.weighting.gamma = 'high': accepted: a number"):
        validate(config)


def test_source_layers():
    assert source_layers("quartiles", 30) == (0, 6, 14, 21, 29)
    assert source_layers("quartiles", 32) == (0, 7, 15, 23, 31)
    assert source_layers("quartiles", 3) == (0, 1, 2)
    assert source_layers("quartiles", 1) == (0,)
    assert source_layers("all", 4) == (0, 1, 2, 3)
    assert source_layers((-1, 0, 5, 29), 30) == (0, 5, 29)
    assert source_layers("rollout", 30) == ("rollout",)
    assert source_layers(("rollout", "-1:10", "29:9", "quartiles"), 30, num_heads=12) == (
        *(0, 6, 14, 21, 29),
        *("29:9", "29:10", "rollout"),
    )
    assert source_layers((3, "5:0", "rollout"), 30, heads="all", num_heads=2) == (
        *(3, "3:0", "3:1"),
        *("5:0", "rollout"),
    )
    with pytest.raises(ConfigError, match=r"judge.layers = \(0, 30\): no layer 30; .*-30 to 29"):
        source_layers((0, 30), 30)
    with pytest.raises(ConfigError, match="no layer 3:9; .* -30 to 29, heads 0 to 8"):
        source_layers("3:9", 30, num_heads=9)


def test_check_layers_wants_the_weighting_s_layer_among_the_sources():
    config = default_config()
    assert check_layers(config, 30) == (0, 6, 14, 21, 29)
    config.weighting.layer = (-1, 7)
    with pytest.raises(ConfigError, match="weighting.layer: layer 7 .*accepted: 0, 6, 14, 21, 29"):
        check_layers(config, 30)
    config.judge.layers = (7, -1)
    assert check_layers(config, 30) == (7, 29)
    complete_sections(config, weighting="uniform")
    assert check_layers(config, 30) == (7, 29)
    config.weighting.name = "attention"
    for layer in ("rollout", "rolout", "29:0"):
        config.weighting.layer = layer
        with pytest.raises(ConfigError, match="config.weighting.layer: .*7, 29"):
            check_layers(config, 30, num_heads=9)
    config.weighting.layer, config.weighting.renormalize = -1, False
    with pytest.raises(ConfigError, match="renormalize = False needs .*whole_responses = True"):
        check_layers(config, 30)
    config.judge.whole_responses = True
    config.judge.layers, config.judge.heads = (-1, "rollout"), "all"
    config.weighting.layer = ("rollout", "-1:8")
    assert check_layers(config, 30, num_heads=9)[-2:] == ("29:8", "rollout")


def test_quartiles_take_global_layers_where_others_have_a_sliding_window():
    config = default_config()
    complete_sections(config, weighting="uniform")
    # Gemma 2: every other layer is global; of those 13, places 0, 2, 5, 8 and 12.
    alternating = (4096, None) * 13
    assert check_layers(config, 26, alternating) == (1, 5, 11, 17, 25)
    # Gemma-3-4B: 5 global layers of 34.
    windows = tuple(None if (i + 1) % 6 == 0 else 1024 for i in range(34))
    assert check_layers(config, 34, windows) == (5, 11, 17, 29)
    config.judge.layers = (0, -1)
    assert check_layers(config, 34, windows) == (0, 33)


def test_quartiles_take_local_layers_only_if_they_see_the_whole_judge_prompt():
    config = default_config()
    complete_sections(config, weighting="uniform")
    assert config.judge.max_length == 2048
    assert check_layers(config, 32, (4096,) * 32) == (0, 7, 15, 23, 31)
    assert check_layers(config, 32, (2048,) * 32) == (0, 7, 15, 23, 31)
    with pytest.raises(ConfigError, match="judge.layers = 'quartiles': .*window shorter than"):
        check_layers(config, 32, (2047,) * 32)
    config.judge.layers = "all"
    assert check_layers(config, 3, (2047,) * 3) == (0, 1, 2)


def test_json_round_trip_keeps_tuples_sections_and_types():
    config = default_config()
    config.data.train = ("a.jsonl", "b.jsonl")
    config.judge.layers = (0, -1)
    config.weighting.layer = (0, 29)
    complete_sections(config, objective="hinge")
    restored = from_json(to_json(config))
    assert diff(config, restored) == {}
    assert restored.weighting.layer == (0, 29) and isinstance(restored.weighting.layer, tuple)
    assert restored.objective.to_dict() == {"name": "hinge", "beta": 0.1, "wpo": False}
    validate(restored)
    with pytest.raises(ConfigError, match="not a config in JSON"):
        from_json("{")
    with pytest.raises(ConfigError, match="config.optim.momentum = 0.9: no config has this field"):
        from_json('{"optim": {"momentum": 0.9}}')
    with pytest.raises(ConfigError, match="config.seed = 'x'"):
        from_json('{"seed": "x"}')


def test_diff_names_fields_on_either_side():
    old, new = default_config(), default_config()
    new.optim.learning_rate = 5e-7
    complete_sections(new, weighting="uniform")
    assert diff(old, new) == {
        "optim.learning_rate": (1e-6, 5e-7),
        "weighting.name": ("attention", "uniform"),
        **{f"weighting.{key}": (value, "(absent)") for key, value in ATTENTION.items()},
    }


def test_load_file_with_and_without_argument(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "from attnpo_jax.config import default_config\n"
        "def get_config(size='4'):\n"
        "    config = default_config()\n"
        "    config.train.batch_size = int(size)\n"
        "    return config\n"
    )
    assert load_file(str(file)).train.batch_size == 4
    assert load_file(f"{file}:64").train.batch_size == 64
    with pytest.raises(ConfigError, match=r"x.py:4: ValueError: invalid literal"):
        load_file(f"{file}:many")


@pytest.mark.parametrize(
    "text, message",
    [
        ("get_config = 3 +", "SyntaxError"),
        ("import attnpo_no_such_module", r"x.py:1: ModuleNotFoundError"),
        ("def config(): pass", r"no function get_config"),
        ("def get_config(): return {}", "returned a dict; accepted: a ConfigDict"),
        (
            "from attnpo_jax.config import default_config\n"
            "def get_config():\n"
            "    c = default_config()\n"
            "    c.optim.lerning_rate = 1.0\n",
            r"x.py:4: AttributeError: .*lerning_rate",
        ),
    ],
)
def test_a_config_file_that_fails_is_named_with_the_line(tmp_path, text, message):
    file = tmp_path / "x.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_file(str(file))
    assert str(file) in str(caught.value)


def test_a_config_file_that_is_not_there_or_takes_no_argument(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.py"):
        load_file(str(tmp_path / "absent.py"))
    file = tmp_path / "x.py"
    file.write_text("def get_config(): return None")
    with pytest.raises(ConfigError, match="takes no argument"):
        load_file(f"{file}:small")


def test_validation_loads_no_model_or_data_library():
    code = (
        "import sys; from attnpo_jax.config import *; validate(default_config());"
        "print([m for m in ('transformers', 'datasets', 'torch', 'flax') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-E", "-c", code], capture_output=True, text=True, check=True
    )
    assert re.search(r"^\[\]$", out.stdout, re.M), out.stdout


def test_examples_in_the_docstrings_run():
    for module, examples in ((checks, 5), (files, 3), (layers, 4), (nested, 2)):
        result = doctest.testmod(module)
        assert (result.failed, result.attempted) == (0, examples), module


def test_a_layer_that_may_not_see_both_answers_is_warned_of(caplog):
    config = default_config()
    config.judge.layers = "all"
    windows = (512, None, 512)
    assert check_layers(config, 3, windows) == (0, 1, 2)
    assert "layer 2, which sees 512 positions back" in caplog.text
    assert "layers that do: 1" in caplog.text
    caplog.clear()
    config.weighting.layer = 1
    check_layers(config, 3, windows)
    config.weighting.layer, config.judge.max_length = 2, 512
    check_layers(config, 3, windows)
    assert not caplog.text
