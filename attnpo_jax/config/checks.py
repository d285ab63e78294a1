"""The search for everything that is wrong with a config."""

import difflib
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from attnpo_jax import losses
from attnpo_jax.config import iterate_fields, rules, scoring
from attnpo_jax.config.errors import ConfigError
from attnpo_jax.config.fields import FIELDS, flatten
from attnpo_jax.config.profiling import profiled
from attnpo_jax.config.reading import reads_distribution
from attnpo_jax.config.sections import SECTIONS
from attnpo_jax.losses.mixture import parse as parse_terms
from attnpo_jax.registry import REQUIRED, PluginError, RegistryError, load_plugins
from attnpo_jax.runtime.best import Choice

_BUILTIN_HYPERPARAMETERS: dict[str, rules.Rule] = {
    "objective.beta": rules.positive(),
    "objective.label_smoothing": rules.share(0.5, inclusive=False),
    "objective.exo.label_smoothing": rules.between(0, 0.5),
    "objective.sigmoid.alpha": rules.positive(),
    "objective.rdpo.alpha": rules.not_negative(),
    "objective.tdpo.alpha": rules.not_negative(),
    "objective.penalty": rules.not_negative(),
    "objective.nll_weight": rules.not_negative(),
    "objective.gamma": rules.not_negative(),
    "objective.tau": rules.between(0, 1, inclusive=True),
    "weighting.alpha": rules.not_negative(),
    "weighting.gamma": rules.share(1, inclusive=True),
    "weighting.limit": rules.positive(),
    "weighting.beta": rules.positive(),
    "weighting.share": rules.positive_share(),
}
"""By section and hyperparameter, or those of one function."""

_WRITERS = {"log.tensorboard": "tensorboardX", "log.wandb": "wandb"}


def validate(config: config_dict.ConfigDict) -> None:
    """Checks every field, alone and against the others, without loading model or data.

    Loads the plugins the config names.

    Raises:
      ConfigError: lists all problems; each names the field, the value found and what is accepted.
    """
    found = problems(config)
    if found:
        raise ConfigError(found)


def problems(config: config_dict.ConfigDict) -> list[str]:
    """Everything that is wrong with a config, one sentence each; its plugins are loaded."""
    found: list[str] = []
    values = {
        name: value for name, value in flatten(config).items() if name.split(".")[0] not in SECTIONS
    }
    for name, value in values.items():
        if name not in FIELDS:
            found.append(f"config.{name} = {value!r}: unknown field{suggest(name, FIELDS)}")
        elif not FIELDS[name].rule.accepts(value):
            found.append(f"config.{name} = {value!r}: accepted: {FIELDS[name].rule.accepted}")
    # A config may give its `data.fields` as a dict of those that it needs.
    for name, field in FIELDS.items():
        if name not in values and not name.startswith("data.fields."):
            # An empty dict has no values, and may stand where a value should.
            empty = functools.reduce(_entry, name.split("."), config) is not None
            found.append(
                f"config.{name} = {{}}: accepted: {field.rule.accepted}"
                if empty
                else f"config.{name}: missing"
            )
    sound = not found
    if sound:
        found += _between_fields(values)

    plugins = values.get("plugins", ())
    if FIELDS["plugins"].rule.accepts(plugins):
        try:
            load_plugins(rules.as_tuple(plugins))
        except PluginError as error:
            return [*found, f"config.plugins: {error}"]
    if isinstance(values.get(scoring.FIELD), Mapping):
        found += scoring.problems(values[scoring.FIELD])
    for section, registry in SECTIONS.items():
        if not isinstance(config.get(section), config_dict.ConfigDict):
            found.append(f"config.{section}: missing (a section with a name)")
        else:
            found += _section_problems(section, registry, config[section])
    return found or [*_margin_problems(config), *_distribution_problems(config)]


def _entry(section: Any, name: str) -> Any:
    there = isinstance(section, (Mapping, config_dict.ConfigDict)) and name in section
    return section[name] if there else None


def suggest(field: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The words " (did you mean config.x?)" for the known fields of such a name, or ""."""
    # A mistyped section, or a mistyped field of a section that there is.
    close = difflib.get_close_matches(field, list(known), n=1, cutoff=0.85)
    if close:
        return f" (did you mean config.{close[0]}?)"
    last = field.split(".")[-1]
    close = [k for k in known if k.split(".")[-1] == last]
    if not close:
        lasts = {k.split(".")[-1]: k for k in known}
        close = [lasts[k] for k in difflib.get_close_matches(last, list(lasts), n=1)]
    least = min((k.count(".") for k in close), default=0)
    close = [k for k in close if k.count(".") == least]  # before those of single evaluations
    return f" (did you mean {' or '.join(f'config.{k}' for k in close)}?)" if close else ""


def _between_fields(values: Mapping[str, Any]) -> list[str]:
    def named(field):
        return f"config.{field} = {values[field]!r}"

    found = []
    if values["train.batch_size"] % values["train.microbatch_size"]:
        found.append(
            f"{named('train.microbatch_size')}: accepted: a divisor of {named('train.batch_size')}"
        )
    if values["data.max_prompt_length"] >= values["data.max_length"]:
        found.append(
            f"{named('data.max_prompt_length')}: accepted: less than {named('data.max_length')}"
        )
    if 2 * values["judge.max_answer_length"] >= values["judge.max_length"]:
        found.append(
            f"{named('judge.max_answer_length')}: accepted: less than half of "
            f"{named('judge.max_length')}, which holds two answers and the question"
        )
    found += [
        f"{named(field)}: accepted: None, or with the judge's model in config.judge.source"
        for field in ("judge.chat_template", "judge.chat_template_kwargs")
        if values[field] is not None and not values["judge.source"]
    ]
    if values["lora.rank"] == 0 and values["lora.export"] != "merged":
        found.append(
            f"{named('lora.export')}: accepted: 'merged', since config.lora.rank = 0 trains the "
            "model itself"
        )
    if values["train.samples.every"] and not (
        values["train.samples.prompts"] or rules.as_tuple(values["data.eval"])
    ):
        found.append(
            f"{named('train.samples.every')}: there are no prompts; accepted: a source in "
            "config.train.samples.prompts, or held-out pairs in config.data.eval"
        )
    profile = profiled(values["log.profile"])
    if profile and 0 < values["train.steps"] < profile.start:
        found.append(f"{named('log.profile')}: accepted: a START of at most {named('train.steps')}")
    found += _of_choosing(values) + iterate_fields.problems(values)
    axes = {f: v for f, v in values.items() if f.startswith("parallel.mesh.")}
    if list(axes.values()).count(-1) > 1:
        listed = ", ".join(named(f) for f in axes)
        found.append(f"{listed}: accepted: -1 for at most one of them")
    if values["parallel.backend"] == "pmap":
        found += [
            f"{named(field)}: accepted: 1, since config.parallel.backend = 'pmap' only splits the "
            "data"
            for field in ("parallel.mesh.fsdp", "parallel.mesh.tensor")
            if values[field] != 1
        ]
    bucket = values["train.checkpoint_dir"].startswith("gs://")
    if bucket and importlib.util.find_spec("gcsfs") is None:
        found.append(f"{named('train.checkpoint_dir')}: needs the package gcsfs: pip install gcsfs")
    if values["evaluate.judge.base_url"]:
        if not values["evaluate.judge.model"]:
            found.append(
                f"{named('evaluate.judge.model')}: accepted: the name of a model of the endpoint "
                "in config.evaluate.judge.base_url"
            )
        if importlib.util.find_spec("openai") is None:
            found.append(
                f"{named('evaluate.judge.base_url')}: needs the package openai: pip install "
                "'.[evaluate]' in a clone"
            )
    for field, package in _WRITERS.items():
        if values[field] and importlib.util.find_spec(package) is None:
            extra = field.split(".")[1]
            found.append(
                f"{named(field)}: needs the package {package}: pip install '.[{extra}]' in a clone"
            )
    return found


def _of_choosing(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with metrics that choose between checkpoints: nothing gives them in time."""
    found = []
    for field in ("train.keep_best", "train.early_stopping.metric"):
        if not values[field]:
            continue
        metric = Choice.parse(values[field]).metric
        named = f"config.{field} = {values[field]!r}"
        evaluations = rules.as_tuple(values["train.evaluations.names"])
        if any(metric.startswith(f"eval_{name}/") for name in evaluations):
            if not values["train.evaluations.every"]:
                found.append(f"{named}: accepted: with config.train.evaluations.every above 0")
        elif not rules.as_tuple(values["data.eval"]):
            found.append(
                f"{named}: there are no held-out pairs; accepted: some in config.data.eval, or a "
                "metric of config.train.evaluations.names"
            )
        elif not values["train.eval_every"]:
            found.append(
                f"{named}: accepted: with config.train.eval_every above 0, or a metric of "
                "config.train.evaluations.names"
            )
    return found


def _section_problems(section: str, registry: Any, values: config_dict.ConfigDict) -> list[str]:
    hyperparameters = dict(values.items())
    name = hyperparameters.pop("name", None)
    try:
        defaults = registry.hyperparameters(name)
    except RegistryError as error:
        return [f"config.{section}.name = {name!r}: {error}"]
    accepted = ", ".join(defaults) or "none"
    found = []
    for key, value in hyperparameters.items():
        field = f"config.{section}.{key} = {value!r}"
        if key not in defaults:
            found.append(f"{field}: {name!r} has no such hyperparameter; accepted: {accepted}")
        elif value is None and defaults[key] is REQUIRED:
            found.append(f"config.{section}.{key}: {name!r} needs a value for it")
        else:
            for rule in _hyperparameter_rules(section, name, key):
                if not rule.accepts(value):
                    found.append(f"{field}: accepted: {rule.accepted}")
                    break
    found += [
        f"config.{section}.{key}: {name!r} needs a value for it"
        for key, default in defaults.items()
        if default is REQUIRED and key not in hyperparameters
    ]
    return found or _binding_problems(section, registry, name, hyperparameters)


def _binding_problems(
    section: str, registry: Any, name: str, hyperparameters: Mapping[str, Any]
) -> list[str]:
    """What can be told of a section's function with its hyperparameters together."""
    try:
        bound = registry.bind(name, hyperparameters)
    except RegistryError as error:
        return [f"config.{section}: {error}"]
    if section != "objective":
        return []
    found = []
    for term, values in _terms(bound):
        for key, value in values.items():
            wrong = [r for r in _hyperparameter_rules(section, term, key) if not r.accepts(value)]
            if wrong:
                found.append(
                    f"config.{section}.terms: {term}({key}={value!r}): accepted: "
                    f"{wrong[0].accepted}"
                )
    return found


def _margin_problems(config: config_dict.ConfigDict) -> list[str]:
    """Margins that the data have and the objective would not read."""
    column = config.data.fields.get("margin", "")
    bound = losses.bind(config.objective.name, _hyperparameters(config.objective))
    if not column or losses.traits(bound).margin:
        return []
    reads = [name for name in losses.names() if losses.traits(losses.get(name)).margin]
    return [
        f"config.data.fields.margin = {column!r}: {config.objective.name!r} reads no margin; "
        f"accepted: '', or as config.objective.name one of {', '.join(reads)}"
    ]


def _distribution_problems(config: config_dict.ConfigDict) -> list[str]:
    """An objective that reads the reference's distribution, which training would not have."""
    from_base = config.lora.rank > 0 and not config.reference.source
    if from_base or config.reference.in_memory or not reads_distribution(config):
        return []
    return [
        f"config.objective.name = {config.objective.name!r} reads the reference's distribution "
        "over the vocabulary, and config.reference.in_memory = False: accepted: True, which holds "
        "a second set of parameters beside the policy's (as many bytes, split over the same "
        "devices; `attnpo plan` counts them), or adapters (config.lora.rank) on a reference that "
        "is model.source, whose parameters are there anyway, or another objective"
    ]


def _hyperparameters(section: config_dict.ConfigDict) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "name"}


def _terms(bound: functools.partial) -> list[tuple[str, Mapping[str, Any]]]:
    """The objectives that an objective is made of, with their hyperparameters."""
    if bound.func is losses.policy_weighted:
        bound = bound.keywords["objective"]
    if bound.func is not losses.mixture:
        return []
    inner = [term for _, term in parse_terms(**bound.keywords)]
    inner = [term.keywords.get("objective", term) for term in inner]
    return [(term.func.__name__, term.keywords) for term in inner]


def _hyperparameter_rules(section: str, name: str, key: str) -> list[rules.Rule]:
    """What a hyperparameter of a registered function accepts; the strictest first."""
    registry = SECTIONS[section]
    hints = registry.annotations(name)
    by_signature = rules.of_hyperparameter(
        registry.hyperparameters(name)[key], *([hints[key]] if key in hints else [])
    )
    builtin = registry.get(name).__module__.startswith("attnpo_jax.")
    fields = (f"{section}.{name}.{key}", f"{section}.{key}") if builtin else ()
    own = [_BUILTIN_HYPERPARAMETERS[f] for f in fields if f in _BUILTIN_HYPERPARAMETERS]
    return [*own, by_signature]


def accepted_words(config: config_dict.ConfigDict, field: str) -> str:
    """What a field of a config accepts, in words.

    >>> from attnpo_jax.config import default_config
    >>> accepted_words(default_config(), "train.batch_size")
    'a whole number from 1 to 1,000,000'
    """
    section, _, key = field.partition(".")
    if section in SECTIONS and key == "name":
        return ", ".join(SECTIONS[section].names())
    return rule_of(config, field).accepted


def takes_several(config: config_dict.ConfigDict, field: str) -> bool:
    """Whether a field of a config takes several names, which commas part on a command line.

    >>> from attnpo_jax.config import default_config
    >>> takes_several(default_config(), "evaluate.names")
    True
    >>> takes_several(default_config(), "model.source")
    False
    """
    named = field in {f"{section}.name" for section in SECTIONS}
    return field in flatten(config) and not named and rule_of(config, field).is_list


def rule_of(config: config_dict.ConfigDict, field: str) -> rules.Rule:
    """What a field of a config accepts; of hyperparameters the strictest rule."""
    section, _, key = field.partition(".")
    if section in SECTIONS:
        return _hyperparameter_rules(section, config[section].name, key)[0]
    return FIELDS[field].rule
