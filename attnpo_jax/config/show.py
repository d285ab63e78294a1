"""What a config comes to: as commented text, as what differs from the defaults, or as JSON."""

import inspect
import json
import re
import textwrap
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

from attnpo_jax.config.default import default_config
from attnpo_jax.config.fields import FIELDS, flatten
from attnpo_jax.config.files import ABSENT, diff, to_json
from attnpo_jax.config.sections import SECTIONS

if TYPE_CHECKING:
    from attnpo_jax.run import Run


def show(run: "Run", *, changed_only: bool = False, as_json: bool = False) -> None:
    """Prints the config of a run.

    Args:
      run: a run, which needs no folder.
      changed_only: print the fields alone that differ from the default config.
      as_json: print JSON, nested as the config is; with `changed_only`, flat: field ->
        [default, value].
    """
    config = run.config
    if changed_only:
        print(_changes_as_json(config) if as_json else _changes(config), end="")
    else:
        print(to_json(config) if as_json else commented(config), end="")


def commented(config: config_dict.ConfigDict) -> str:
    """Lines `field = value`, each under a comment that says what the field means."""
    values = flatten(config)
    parts = [_entry(name, values[name], plain_help(field.help)) for name, field in FIELDS.items()]
    for section in SECTIONS:
        meanings = meanings_of(section, config[section].name)
        names = [name for name in values if name.split(".")[0] == section]
        # The name first: it says which function the others are of.
        for name in sorted(names, key=lambda name: name != f"{section}.name"):
            parts.append(_entry(name, values[name], meanings.get(name, "")))
    return "\n".join(parts)


def meanings_of(section: str, function: str) -> dict[str, str]:
    """What the fields of `weighting` or `objective` mean, from the function's docstring.

    Args:
      section: `weighting` or `objective`.
      function: a registered function.

    Returns:
      By dotted name; without the hyperparameters that the docstring does not tell of.
    """
    registry = SECTIONS[section]
    documented = inspect.getdoc(registry.get(function)) or ""
    options = registry.registry.options
    meanings = {f"{section}.name": documented.partition("\n\n")[0]}
    for key in registry.hyperparameters(function):
        # An entry of Google style: two spaces, its name; its further lines have more of them.
        found = re.search(rf"^  {key}: (.*(?:\n {{4,}}.*)*)", documented, re.M)
        if found:
            meanings[f"{section}.{key}"] = found[1]
        elif key in options:
            meanings[f"{section}.{key}"] = options[key]
    return {name: " ".join(text.split()) for name, text in meanings.items()}


def _entry(name: str, value: Any, meaning: str) -> str:
    comment = textwrap.fill(meaning, 98, initial_indent="# ", subsequent_indent="# ")
    return f"{comment}\n{name} = {value!r}\n" if meaning else f"{name} = {value!r}\n"


def plain_help(text: str) -> str:
    """A text of the documentation without its links and backticks."""
    without_links = re.sub(r" \(\[[^]]*\]\([^)]*\)\)", "", text)
    return without_links.replace("`", "")


def _changes(config: config_dict.ConfigDict) -> str:
    lines = []
    for name, (old, new) in diff(default_config(), config).items():
        if new == ABSENT:
            lines.append(f"# no {name}\n")
        else:
            was = "not in the default config" if old == ABSENT else f"default: {old!r}"
            lines.append(f"{name} = {new!r}  # {was}\n")
    return "".join(lines) or "# nothing differs from the defaults\n"


def _changes_as_json(config: config_dict.ConfigDict) -> str:
    return json.dumps(diff(default_config(), config), indent=2) + "\n"
