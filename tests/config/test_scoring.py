"""`config.prepare.scorers`: what is accepted, and how files, JSON and command lines set it."""

import pytest

from attnpo_jax.config import (
    ConfigError,
    default_config,
    diff,
    flatten,
    from_json,
    load_config,
    scorers,
    to_json,
    validate,
)
from attnpo_jax.config.scoring import Scorer, union
from attnpo_jax.runtime.errors import UsageError


def with_scorers(named):
    config = default_config()
    config.prepare.scorers = named
    return config


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        (
            {"pos": {"modle": "a/b"}},
            "config.prepare.scorers.pos.modle = 'a/b': unknown key (did you mean model?); accepted "
            "keys: model, adapter, prefix, prefix_role, chat_template, chat_template_kwargs, or "
            "function and its hyperparameters",
        ),
        (
            {"new": {"function": "diff", "prefix": "x"}},
            "config.prepare.scorers.new.prefix = 'x': unknown key (a key of scorers that are "
            "models); accepted keys with function = 'diff': function",
        ),
        (
            {"new": {"function": "dif"}},
            "config.prepare.scorers.new.function = 'dif': unknown scorer 'dif'; accepted: ",
        ),
        (
            {"a.b": {}},
            "config.prepare.scorers has 'a.b'; accepted: names of letters, digits, _ and -, 64 at "
            "most, that begin with a letter",
        ),
        ({"a": "b"}, "config.prepare.scorers.a = 'b': accepted: a dict; keys: model, "),
        (
            {"a": {"prefix": "x", "prefix_role": "tool"}},
            "config.prepare.scorers.a.prefix_role = 'tool': accepted: 'system', 'user'",
        ),
        (
            {"a": {"chat_template": "no/such.jinja"}},
            "config.prepare.scorers.a.chat_template = 'no/such.jinja': accepted: None or an "
            "existing file",
        ),
        (
            ["a"],
            "config.prepare.scorers = ['a']: accepted: a dict of scorers by name, each a dict",
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_is_accepted(named, problem):
    with pytest.raises(ConfigError) as caught:
        validate(with_scorers(named))
    assert caught.value.problems[0].startswith(problem)


def test_hyperparameters_of_a_plugin_are_keys(tmp_path):
    plugin = tmp_path / "mine.py"
    name = f"place_{abs(hash(tmp_path))}"
    plugin.write_text(
        "from attnpo_jax import scorers\n"
        "@scorers.register\n"
        f"def {name}(tokens, others, *, scale: float, up: bool = True): return tokens * scale\n"
    )
    config = with_scorers({"p": {"function": name, "scale": 2.0}})
    config.plugins = (str(plugin),)
    validate(config)
    (found,) = scorers(config)
    assert found.hyperparameters == {"scale": 2.0} and found.function.func.__name__ == name
    for given, problem in (({}, f"{name!r} needs a value for it"), ({"scale": "x"}, "a number")):
        config.prepare.scorers = {"p": {"function": name, **given}}
        with pytest.raises(ConfigError, match=f"config.prepare.scorers.p.scale.*: .*{problem}"):
            validate(config)


def test_a_command_line_adds_and_changes_scorers():
    config = load_config(
        None,
        [
            "--config.prepare.scorers={'pos': {'prefix': 'Be kind.'}}",
            "--config.prepare.scorers.pos.prefix_role=user",
            "--config.prepare.scorers.neg.model=owner/name",
            "--config.prepare.scorers.new.function=diff",
        ],
    )
    validate(config)
    neg, new, pos = scorers(config)
    assert neg == Scorer("neg", model="owner/name")
    assert pos == Scorer("pos", prefix="Be kind.", prefix_role="user")
    assert new.name == "new" and new.function.func.__name__ == "diff"
    # Another config has none, and JSON brings them back.
    assert default_config().prepare.scorers == {}
    again = from_json(to_json(config))
    assert again.prepare.scorers == config.prepare.scorers and not diff(config, again)
    copied = config.copy_and_resolve_references()
    assert scorers(copied)[::2] == (neg, pos)
    assert flatten(copied)["prepare.scorers"] == config.prepare.scorers
    for wrong in ("prepare.scorers.pos=3", "prepare.scorers.pos.prefix.x=3"):
        with pytest.raises(UsageError, match="accepted: --config.prepare.scorers.NAME.KEY=VALUE"):
            load_config(None, [f"--config.{wrong}"])


def test_the_union_of_several_configs_has_one_meaning_of_a_name():
    kind, new = {"prefix": "Be kind."}, {"function": "diff"}
    assert union([{"a": kind}, {}, {"b": new, "a": dict(kind)}]) == {"a": kind, "b": new}
    with pytest.raises(ConfigError, match="prepare.scorers.a = .*diff.* one meaning of a name"):
        union([{"a": kind}, {"a": new}])
