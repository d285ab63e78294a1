"""The default config, config files, the sections of weightings and objectives, and JSON.

A config file is Python with a `get_config()` that starts from `default_config()`:

    from attnpo_jax import losses
    from attnpo_jax.config.core import default_config, section_for

    def get_config():
        config = default_config()
        config.data.train = "pairs.jsonl"
        config.objective = section_for(losses, "ipo", beta=0.05)
        return config

`validate` finds every mistake that can be found without the model and the data.
"""

import importlib.util
import inspect
import json
import logging
import pathlib
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ml_collections import config_dict

from attnpo_jax import losses, weighting
from attnpo_jax.config.rules import ConfigError, as_tuple, problems
from attnpo_jax.registry import REQUIRED, PluginError, RegistryError, load_plugins

_LOG = logging.getLogger(__name__)

__all__ = [
    "ConfigError",
    "bind_section",
    "check_columns",
    "check_layers",
    "complete_sections",
    "default_config",
    "diff",
    "flatten",
    "from_json",
    "judge_layers",
    "load_file",
    "section_for",
    "source_layers",
    "to_json",
    "validate",
    "weight_columns",
]

SECTIONS = {"weighting": weighting, "objective": losses}
"""Sections whose fields are a name and that function's hyperparameters, and their registries."""


def _any(value: Any) -> config_dict.FieldReference:
    """A field that takes values of several types."""
    return config_dict.FieldReference(value, field_type=object)


def default_config() -> config_dict.ConfigDict:
    """Every field with its default; locked, so that a mistyped field fails where it is set."""
    config = config_dict.ConfigDict()

    # Of the order of the pairs.
    config.seed = 0

    config.model = model = config_dict.ConfigDict()
    # Hub id, local Hugging Face folder, or "smollm2-135m-instruct" (fetched once, then cached).
    model.source = "smollm2-135m-instruct"
    # Jinja file used in place of the tokenizer's own chat template; None: the tokenizer's.
    model.chat_template = _any(None)
    # What the forward and backward passes compute in: "float32" or "bfloat16".
    model.dtype = "float32"
    # What the parameters are kept in: "float32" or "bfloat16".
    model.param_dtype = "float32"
    # What the judge's and the reference's passes hold the projections in: "full" (param_dtype), or
    # "int8" with a scale for each output channel.
    model.prepare_weights = "full"
    # What the backward pass recomputes: "none" (most memory), "dots" (all but the outputs of
    # matrix products), "layer" (all but each layer's input; least memory).
    model.remat = "dots"
    # What computes attention: "xla" (everywhere), "cudnn" (NVIDIA GPUs, bfloat16), "tokamax" (TPUs,
    # extra "tokamax"), or "auto": the last two where they can serve, "xla" elsewhere.
    model.attention = "auto"
    # Tokens that are projected to the vocabulary at a time; bounds the memory of the logits.
    model.logps_chunk = 2048

    config.data = data = config_dict.ConfigDict()
    # A source of pairs or a tuple of them: "builtin:train", a .json, .jsonl, .parquet or .arrow
    # file, a dataset folder, or a hub id "owner/name[:config]@split". A mixture gives each its
    # share: ("a.jsonl*0.7", "b.jsonl*0.3").
    data.train = _any("builtin:train")
    # The same for the held-out pairs; "" for no evaluation.
    data.eval = _any("builtin:eval")
    # Token weights to read from the pairs' rows, for the weighting "column": none, "all", or the
    # names of columns chosen_weights_NAME, rejected_weights_NAME.
    data.weight_columns = _any(())
    # Hugging Face folder or hub id of the tokenizer that made chosen_tokens and rejected_tokens,
    # which these weights stand for; None: the model's.
    data.weights_tokenizer = _any(None)
    # Tokens of prompt and response together; a longer response loses its last ones.
    data.max_length = 2048
    # Tokens of the prompt; a longer one loses its first ones.
    data.max_prompt_length = 1800
    # Whether each epoch goes through the pairs in an order of its own.
    data.shuffle = True
    # What to do with a bad row: "error" (stop) or "skip" (count it, write it to bad_rows.jsonl).
    data.on_bad_row = "error"
    # How many row lengths batches are padded to; each is one compilation per pass.
    data.num_buckets = 6

    config.judge = judge = config_dict.ConfigDict()
    # "default", or a text file with the slots {question}, {answer_a} and {answer_b}.
    judge.template = "default"
    # Tokens of the rendered judge prompt. One that reaches it has its answers, then its question
    # shortened.
    judge.max_length = 2048
    # Tokens each answer keeps in a prompt that has to be shortened.
    judge.max_answer_length = 768
    # Layers whose attention is kept: "quartiles" (first, one per quarter, last; of a model with
    # sliding-window layers, among its global ones), "all", a tuple of layer numbers, negative
    # ones counted from the last, or "none": nothing is judged.
    judge.layers = _any("quartiles")
    # Whether the judge's answer is wanted too; without it, layers above the last of judge.layers
    # do not run.
    judge.verdict = True
    # Pairs judged, or scored by the reference, at a time, at most.
    judge.batch_size = 8
    # Tokens of a batch (rows times their padded length), at most; a longer row goes alone.
    judge.token_budget = 4096
    # Row lengths that they are padded to; each is one compilation of a forward pass, or up to four,
    # for batches that are not full.
    judge.num_buckets = 8

    config.prepare = prepare = config_dict.ConfigDict()
    # Pairs in one file of the prepared dataset; an interruption loses less than one file.
    prepare.rows_per_shard = 256
    # Of several processes: "process", each prepares shards of its own on its own devices, which the
    # model must fit; "all", all prepare the same shards together, on the mesh that training has;
    # "auto", the first while the model takes no more than half of those devices' memory.
    prepare.devices = "auto"

    # The name of a token weighting and its hyperparameters (see attnpo_jax.weighting).
    config.weighting = section_for(weighting, "attention")
    # The name of an objective and its hyperparameters (see attnpo_jax.losses).
    config.objective = section_for(losses, "sigmoid")

    config.optim = optim = config_dict.ConfigDict()
    # AdamW's peak learning rate, reached at the end of the warm-up.
    optim.learning_rate = 1e-6
    # After the warm-up: "cosine" or "linear" down to 0 at the last step's end, or "constant".
    optim.schedule = "cosine"
    # Share of the steps in which the learning rate rises from 0.
    optim.warmup_ratio = 0.1
    # AdamW's decay rates of the first and second moment, its epsilon, and its weight decay.
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.eps = 1e-8
    optim.weight_decay = 0.0
    # Largest global norm of the gradient, to which larger ones are scaled down; 0: no limit.
    optim.max_grad_norm = 1.0

    config.lora = lora = config_dict.ConfigDict()
    # Rank of low-rank adapters, which are then trained in place of the model; 0: train the model.
    lora.rank = 0
    # What adapters add is scaled by alpha / rank.
    lora.alpha = 16.0
    # Projections that have one: "all", "attention", "mlp", or names such as "q_proj".
    lora.targets = _any("all")
    # What `export` writes: the model with the adapters "merged" in, the "adapter" alone as PEFT
    # reads it, or "both".
    lora.export = "merged"

    config.train = train = config_dict.ConfigDict()
    # Pairs in one optimizer step, over all devices.
    train.batch_size = 32
    # Pairs in one forward and backward pass, over all devices; divides batch_size.
    train.microbatch_size = 4
    # Passes over the training pairs.
    train.epochs = 1
    # Optimizer steps; 0: as many as the epochs take.
    train.steps = 0
    # Steps between two lines of metrics.
    train.log_every = 1
    # Steps between two evaluations; 0: only before the first step and after the last.
    train.eval_every = 0
    # Pairs in one evaluation batch, over all devices.
    train.eval_batch_size = 8
    # Steps between two checkpoints; 0: only after the last step.
    train.save_every = 100
    # How many of the newest checkpoints to keep.
    train.keep_checkpoints = 2
    # Where checkpoints go: a folder or gs://BUCKET/FOLDER; "" for WORKDIR/checkpoints.
    train.checkpoint_dir = ""

    config.parallel = parallel = config_dict.ConfigDict()
    # "jit" (a mesh of devices), or "pmap" (plain data parallelism, everything replicated).
    parallel.backend = "jit"
    # Sizes of the mesh's axes; one may be -1, which means the devices that are left.
    parallel.mesh = mesh = config_dict.ConfigDict()
    # Copies of the model, each with its own pairs.
    mesh.data = -1
    # Devices that share parameters and optimizer state, each with its own pairs.
    mesh.fsdp = 1
    # Devices that share the work of each layer on the same pairs.
    mesh.tensor = 1

    config.log = log = config_dict.ConfigDict()
    # Progress bars on the terminal.
    log.progress = True
    # TensorBoard event files in workdir/tensorboard (extra "tensorboard").
    log.tensorboard = False
    # Weights & Biases (extra "wandb"), and the project the run goes to.
    log.wandb = False
    log.wandb_project = "attnpo_jax"

    # Python files that register weightings or objectives of your own.
    config.plugins = ()

    return config.lock()


def section_for(registry: Any, name: str, **overrides: Any) -> config_dict.ConfigDict:
    """The config section of a weighting or objective: its name and its hyperparameters.

    Args:
      registry: `attnpo_jax.weighting`, `attnpo_jax.losses`, or a `Registry`.
      name: a registered function.
      **overrides: hyperparameters that shall not have their defaults.

    Raises:
      RegistryError: no such function, or no such hyperparameter; the message lists those there are.
    """
    defaults = registry.hyperparameters(name)
    annotations = registry.annotations(name)
    unknown = sorted(set(overrides) - set(defaults))
    if unknown:
        raise RegistryError(
            f"{name!r} has no hyperparameter {', '.join(map(repr, unknown))}; "
            f"accepted: {', '.join(defaults) or 'none'}"
        )
    section = config_dict.ConfigDict({"name": name})
    for key, default in defaults.items():
        value = overrides.get(key, None if default is REQUIRED else default)
        kind = annotations.get(key, type(default))
        if kind in (bool, float, str) and isinstance(value, kind):
            section[key] = value
        else:
            section[key] = _any(value)
    return section


def bind_section(registry: Any, section: Mapping[str, Any]) -> partial:
    """The function a section names, with the section's hyperparameters.

    Raises:
      RegistryError: see `Registry.bind`.
    """
    hyperparameters = dict(section.items())
    return registry.bind(hyperparameters.pop("name"), hyperparameters)


def complete_sections(config: config_dict.ConfigDict, **names: str) -> config_dict.ConfigDict:
    """Gives `config.weighting` and `config.objective` all the fields of their functions, in place.

    Args:
      config: whose `plugins` are loaded first.
      **names: `weighting` or `objective`: the function to switch that section to. Values of
        hyperparameters that both functions have are kept, the others' are dropped.

    Returns:
      The same config.

    Raises:
      ConfigError: a plugin that cannot be loaded, or a name that is not registered.
    """
    try:
        load_plugins(as_tuple(config.get("plugins", ())))
    except PluginError as error:
        raise ConfigError([f"config.plugins: {error}"]) from error
    for field, registry in SECTIONS.items():
        if not isinstance(config.get(field), config_dict.ConfigDict):
            raise ConfigError([f"config.{field}: missing (start from default_config())"])
        old = dict(config[field].items())
        old_name = old.pop("name", None)
        name = names.get(field, old_name)
        try:
            accepted = registry.hyperparameters(name)
        except RegistryError as error:
            raise ConfigError([f"config.{field}.name: {error}"]) from error
        section = section_for(registry, name, **{k: v for k, v in old.items() if k in accepted})
        if name == old_name:
            # Fields the function does not have stay, for `validate` to report.
            for key in old.keys() - accepted.keys():
                section[key] = _any(old[key])
        config[field] = section.lock() if config.is_locked else section
    return config


def validate(config: config_dict.ConfigDict) -> None:
    """Checks every field, alone and against the others, without loading model or data.

    Loads the plugins the config names.

    Raises:
      ConfigError: lists all problems; each names the field, the value found and what is accepted.
    """
    found = problems(config, default_config(), SECTIONS)
    if found:
        raise ConfigError(found)


def source_layers(
    judge_layers: str | Sequence[int],
    num_layers: int,
    global_layers: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The layers whose attention the judge keeps, counted from 0.

    Args:
      judge_layers: `config.judge.layers`.
      num_layers: how many layers the model has.
      global_layers: the layers that see the whole judge prompt, ascending, of which `quartiles`
        chooses; None for all.

    Raises:
      ConfigError: a layer the model does not have, or `quartiles` of no global layer.

    >>> source_layers("quartiles", 30)
    (0, 6, 14, 21, 29)
    >>> source_layers((0, -1), 30)
    (0, 29)
    >>> source_layers("quartiles", 10, global_layers=(4, 9))
    (4, 9)
    """
    if judge_layers == "none":
        return ()
    if judge_layers == "all":
        return tuple(range(num_layers))
    if judge_layers == "quartiles":
        candidates = range(num_layers) if global_layers is None else global_layers
        if not candidates:
            raise ConfigError(
                [
                    "config.judge.layers = 'quartiles': every layer of this model has a sliding "
                    "window shorter than judge.max_length, so none is sure to see both answers; "
                    "accepted: layers by number, or a judge.max_length within the window"
                ]
            )
        n = len(candidates)
        quarters = (n // 4, n // 2, 3 * n // 4, n)
        places = sorted({0, *(max(quarter - 1, 0) for quarter in quarters)})
        return tuple(candidates[place] for place in places)
    outside = [x for x in judge_layers if not -num_layers <= x < num_layers]
    if outside:
        raise ConfigError(
            [
                f"config.judge.layers = {tuple(judge_layers)!r}: no layer "
                f"{', '.join(map(str, outside))}; accepted for this model of {num_layers} layers: "
                f"{-num_layers} to {num_layers - 1}"
            ]
        )
    # Ascending and each once, so that (0, -1) and (0, 29) name the same prepared dataset.
    return tuple(sorted({x % num_layers for x in judge_layers}))


def judge_layers(
    config: config_dict.ConfigDict,
    num_layers: int,
    layer_windows: Sequence[int | None] | None = None,
) -> tuple[int, ...]:
    """The layers that `judge.layers` means for a model.

    `quartiles` takes global layers alone: one with a sliding window may not see both answers. Where
    all layers have a window, those will do whose window holds the whole judge prompt.

    Args:
      config: the run's config.
      num_layers: how many layers the model has.
      layer_windows: see `models.config.ModelConfig`.

    Raises:
      ConfigError: a layer the model does not have.
    """
    return source_layers(config.judge.layers, num_layers, _global_layers(config, layer_windows))


def _global_layers(
    config: config_dict.ConfigDict, layer_windows: Sequence[int | None] | None
) -> list[int] | None:
    """The layers that see whole judge prompts; None for all of them."""
    if layer_windows is None:
        return None
    return [i for i, window in enumerate(layer_windows) if window is None] or [
        i for i, window in enumerate(layer_windows) if window >= config.judge.max_length
    ]


def check_layers(
    config: config_dict.ConfigDict,
    num_layers: int,
    layer_windows: Sequence[int | None] | None = None,
) -> tuple[int, ...]:
    """Checks `judge.layers` and `weighting.layer` against the layers of the model.

    Warns of a weighting's layer that may not see both answers, so it is asked once a command.

    Args:
      config: the run's config.
      num_layers: how many layers the model has.
      layer_windows: see `models.config.ModelConfig`.

    Returns:
      The judge's source layers, see `judge_layers`.

    Raises:
      ConfigError: a layer the model does not have, or a weighting's layer the judge does not keep.
    """
    sources = judge_layers(config, num_layers, layer_windows)
    if "layer" in config.weighting and not sources:
        raise ConfigError(
            [
                "config.judge.layers = 'none': the weighting "
                f"{config.weighting.name!r} reads the judge's attention; accepted: layers, or "
                "another weighting"
            ]
        )
    if "layer" in config.weighting:
        try:
            weighting.select_sources(config.weighting.layer, sources, num_layers)
        except ValueError as error:
            raise ConfigError(
                [f"config.weighting.layer: {error}; config.judge.layers says which layers are kept"]
            ) from error
        layer = range(num_layers)[config.weighting.layer] if _is_layer(config, num_layers) else None
        window = None if layer_windows is None or layer is None else layer_windows[layer]
        if window is not None and window < config.judge.max_length:
            _LOG.warning(
                "weighting.layer = %d is layer %d, which sees %d positions back, and judge prompts "
                "may have %d: it may not see both answers; layers that do: %s",
                config.weighting.layer,
                layer,
                window,
                config.judge.max_length,
                ", ".join(map(str, _global_layers(config, layer_windows))) or "none",
            )
    return sources


def _is_layer(config: config_dict.ConfigDict, num_layers: int) -> bool:
    """Whether the weighting reads one layer."""
    layer = config.weighting.layer
    return isinstance(layer, int) and -num_layers <= layer < num_layers


def weight_columns(config: config_dict.ConfigDict) -> str | tuple[str, ...]:
    """The precomputed weights to read: "all", or names, ready for `data.sources.load_pairs`."""
    columns = config.data.weight_columns
    return "all" if columns == "all" else tuple(map(str, as_tuple(columns)))


def check_columns(config: config_dict.ConfigDict, available: Sequence[str]) -> None:
    """Checks `weighting.column` against the precomputed weights that there are.

    Raises:
      ConfigError: a column that the data lack.
    """
    if "column" in config.weighting:
        try:
            weighting.select_columns(config.weighting.column, available)
        except ValueError as error:
            raise ConfigError([f"config.weighting.column: {error}"]) from error


def load_file(spec: str) -> config_dict.ConfigDict:
    """Runs a config file's `get_config()`.

    Args:
      spec: path of the file, or `path:argument` for a `get_config(argument)`.

    Raises:
      FileNotFoundError: no such file.
      ConfigError: the file fails, has no `get_config`, or returns something else than a config.
    """
    path, _, argument = spec.partition(":")
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"--config={spec}: no file {file}")
    module_spec = importlib.util.spec_from_file_location(f"attnpo_config_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError([f"--config={spec}: {file} is not a Python file ending in .py"])
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise ConfigError([f"{file}: has no function get_config()"])
        if argument and not inspect.signature(get_config).parameters:
            raise ConfigError([f"--config={spec}: get_config() of {file} takes no argument"])
        config = get_config(argument) if argument else get_config()
    except ConfigError:
        raise
    except Exception as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
        ]
        where = f"{file}:{lines[-1]}" if lines else str(file)
        raise ConfigError([f"{where}: {type(error).__name__}: {error}"]) from error
    if not isinstance(config, config_dict.ConfigDict):
        raise ConfigError(
            [f"{file}: get_config() returned a {type(config).__name__}; accepted: a ConfigDict"]
        )
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All fields by dotted name, lists as tuples."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (config_dict.ConfigDict, Mapping)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = _as_tuples(value)
    return flat


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def diff(old: config_dict.ConfigDict, new: config_dict.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, by dotted name: (value in `old`, value in `new`), "(absent)" for none.

    >>> new = default_config()
    >>> new.optim.learning_rate = 5e-7
    >>> diff(default_config(), new)
    {'optim.learning_rate': (1e-06, 5e-07)}
    """
    a, b = flatten(old), flatten(new)
    keys = [*a, *(key for key in b if key not in a)]
    sides = {key: (a.get(key, "(absent)"), b.get(key, "(absent)")) for key in keys}
    return {key: side for key, side in sides.items() if side[0] != side[1]}


def to_json(config: config_dict.ConfigDict) -> str:
    """The config as indented JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> config_dict.ConfigDict:
    """The config that `to_json` wrote.

    Raises:
      ConfigError: not JSON, or fields that no config has, or of another type than theirs.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"not a config in JSON: {error}"]) from error
    config = default_config()
    with config.unlocked():
        for field in SECTIONS:
            if field in values:
                section = {key: _as_tuples(value) for key, value in values.pop(field).items()}
                config[field] = config_dict.ConfigDict(
                    {key: v if key == "name" else _any(v) for key, v in section.items()}
                )
    known = flatten(config)
    found = []
    for field, value in flatten(values).items():
        *parents, last = field.split(".")
        if field not in known:
            found.append(f"config.{field} = {value!r}: no config has this field")
            continue
        section = config
        for parent in parents:
            section = section[parent]
        try:
            section[last] = value
        except TypeError as error:
            found.append(f"config.{field} = {value!r}: {error}")
    if found:
        raise ConfigError(found)
    return config
