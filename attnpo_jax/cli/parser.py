"""The parser of each command's options."""

import argparse
import functools
import re
from typing import NoReturn

from attnpo_jax.cli.commands import COMMANDS, Command, command_of
from attnpo_jax.runtime.errors import UsageError

LEVELS = ("debug", "info", "warning", "error")
# Those of commands that several processes may run; named as `jax.distributed.initialize` has them.
PROCESS_OPTIONS = {
    "coordinator-address": (
        "HOST:PORT",
        "Where process 0 of a run of several processes listens; this and the next two are needed "
        "only where the environment does not say.",
    ),
    "num-processes": ("N", "How many processes the run has."),
    "process-id": ("I", "Which one of them this is, from 0."),
}


def needed_by(command: Command) -> dict[str, str]:
    """The options that a command needs, with an example each."""
    needed = {} if not command.needs_config else {"config": "configs/quickstart.py"}
    if command.workdir == "needed":
        needed["workdir"] = "DIR"
    return needed | {k: option.example for k, option in command.options.items() if option.example}


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong, for `program.exit_code` to tell."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows options as --option=VALUE, as they are written here."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = f"={action.metavar}" if action.nargs is None else ""
        return ", ".join(f"{flag}{value}" for flag in action.option_strings)


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command's options; overrides of config fields are taken out before."""
    command = command_of(name)
    metavars = {"config": "FILE", "workdir": "DIR"}
    needed = "".join(f" --{key}={metavars.get(key, key.upper())}" for key in needed_by(command))
    example = "" if command.example is None else f"\n\nexample:\n  {command.example}"
    folders = " [WORKDIR ...]" if command.folders else ""
    parser = _Parser(
        f"attnpo {name}",
        usage=f"attnpo {name}{folders}{needed} [--config.SECTION.FIELD=VALUE ...]{example}",
        description=command.summary,
        epilog=_variants_of(name),
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add_options(parser, command)
    return parser


def _variants_of(name: str) -> str | None:
    """The list of the commands whose names begin with this one's, for its help."""
    variants = {
        key.partition(" ")[2]: command.summary
        for key, command in COMMANDS.items()
        if key.startswith(f"{name} ")
    }
    if not variants:
        return None
    listed = "\n".join(f"  {key:<15}{summary}" for key, summary in variants.items())
    return f"{name.capitalize()} NAME, with options of its own:\n{listed}"


def add_options(parser: argparse.ArgumentParser, command: Command) -> None:
    add = parser.add_argument_group("Options").add_argument
    add(
        "--config",
        metavar="FILE[:ARG]",
        type=_given,
        help="Config file, a Python file with get_config(), ARG its argument; or the config.json "
        "of a run.",
    )
    # Shown here, and understood by `_without_overrides`.
    add(
        "--config.SECTION.FIELD",
        metavar="VALUE",
        help="Set one field of the config; any number of these.",
    )
    for key, option in command.options.items():
        if option.kind is bool:
            add(f"--{key}", action="store_true", help=option.summary)
        else:
            kind = functools.partial(_count, least=option.least) if option.kind is int else _given
            metavar = key.upper().rpartition("-")[2]
            action = "append" if option.repeated else "store"
            add(f"--{key}", metavar=metavar, type=kind, action=action, help=option.summary)
    _add_fields(parser, command)
    if command.workdir != "none":
        add(
            "--workdir",
            metavar="DIR",
            type=_given,
            help="Folder of everything that is written: config.json, prepared/, checkpoints/, "
            "metrics.jsonl, export/.",
        )
    if command.workdir != "none" and not command.alone:
        for key, (metavar, summary) in PROCESS_OPTIONS.items():
            add(f"--{key}", metavar=metavar, type=_given, help=summary)
    add("--verbosity", metavar="LEVEL", type=_level, help=f"{', '.join(LEVELS)} [info].")
    add(
        "--flagfile",
        metavar="FILE",
        type=_given,
        help="Read further options from a file, one a line.",
    )
    add("-h", "--help", action="store_true", help="Print this.")


def field_options(command: Command) -> dict[str, str]:
    """The options that are fields of the config, each with its field."""
    if not command.sections:
        return {}  # without the libraries that the table of fields needs
    from attnpo_jax.config.fields import FIELDS

    return {
        prefix + field.removeprefix(f"{section}.").replace("_", "-"): field
        for section, prefix in command.sections.items()
        for field in FIELDS
        if field.startswith(f"{section}.")
    }


def _add_fields(parser: argparse.ArgumentParser, command: Command) -> None:
    if not command.sections:
        return
    from attnpo_jax.config.fields import FIELDS

    groups = {
        section: parser.add_argument_group(f"Fields of config.{section}")
        for section in command.sections
    }
    for option, name in field_options(command).items():
        add = groups[name.rpartition(".")[0]].add_argument
        text = f"{FIELDS[name].help} [{FIELDS[name].default!r}].".replace("%", "%%")
        add(f"--{option}", metavar="VALUE", type=_given, help=text)


def _given(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("needs a value")
    return text


def _count(text: str, least: int) -> int:
    if not re.fullmatch(r"0|[1-9]\d*", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"={text}; accepted: a number from {least} up")
    return int(text)


def _level(text: str) -> str:
    if _given(text) not in LEVELS:
        raise argparse.ArgumentTypeError(f"={text}; accepted: {', '.join(LEVELS)}")
    return text
