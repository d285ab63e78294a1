"""The command line: `attnpo <command> --config=FILE --workdir=DIR [--config.section.field=value]`.

Parses, checks, and calls; the work is in the modules it calls. Nothing heavy is imported before a
command really runs, so that `attnpo --help` answers at once.
"""

import argparse
import difflib
import gc
import importlib
import importlib.metadata
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import attnpo_jax
from attnpo_jax.cli.commands import COMMANDS, command_of
from attnpo_jax.cli.parser import (
    LEVELS,
    PROCESS_OPTIONS,
    add_options,
    field_options,
    needed_by,
    parser_of,
)
from attnpo_jax.runtime import cache, program
from attnpo_jax.runtime.errors import UsageError

# Objects that are made before Python looks for cycles among them. Python's own number is 700, and
# tracing makes millions.
_OBJECTS_PER_COLLECTION = 20_000

COMPLETION_SUMMARY = "Print a script that completes commands and options in bash or zsh."
VERSION_SUMMARY = "Print the versions of attnpo_jax and of the libraries it computes with."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
      argv: the arguments after the program's name; None: the process's own.

    Returns:
      Exit code, as `runtime.program.exit_code` says.

    Raises:
      Exception: whatever is not expected, with its traceback.
    """
    if argv is None:
        gc.set_threshold(_OBJECTS_PER_COLLECTION)
    arguments = sys.argv[1:] if argv is None else list(argv)
    return program.exit_code("attnpo", lambda: _main(arguments))


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "-help", "--help", "help"):
        return _say(_help())
    name, *arguments = argv
    if name in ("version", "--version"):
        return _version(arguments)
    if name == "completion":
        return _completion(arguments)
    if name == "evaluate" and arguments and not arguments[0].startswith("-"):
        name = f"{name} {arguments.pop(0)}"
        _check_evaluation(name, arguments)
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"unknown command {name!r}{hint}; commands: {', '.join(COMMANDS)}")
    command = command_of(name)
    options, overrides = parse(name, arguments)
    if "help" in options:
        return _say(parser_of(name).format_help())
    for required, example in needed_by(command).items():
        if not options.get(required):
            raise UsageError(f"{name} needs --{required}={example}")
    workdir = workdir_path(options["workdir"]) if options.get("workdir") else None
    program.start_logging(options.get("verbosity") or "info")
    if command.alone:
        from attnpo_jax.parallel import processes

        if processes.find(os.environ) is not None:
            raise UsageError(
                f"the environment announces several processes, but a {name} runs in one, which "
                "ATTNPO_DISTRIBUTED=0 makes it"
            )
    elif command.workdir != "none":
        # Before config files and plugins, which may ask for devices.
        from attnpo_jax.parallel import failures

        failures.join({name: options[name] for name in PROCESS_OPTIONS if name in options})

    from attnpo_jax import config
    from attnpo_jax.run import Run

    run = Run.resolve(config.load_config(options.get("config"), overrides), workdir)
    cache.keep_compiled_programs()
    own = {option.keyword: options[k] for k, option in command.options.items() if k in options}
    own |= command.given
    if command.folders and options.get("folders"):
        own[command.folders] = options["folders"]
    getattr(importlib.import_module(command.module), command.function)(run, **own)
    return 0


def _check_evaluation(name: str, arguments: Sequence[str]) -> None:
    """Raises UsageError for an evaluation that the package lacks and no config can have."""
    if name in COMMANDS or any(re.match("--?(config|help|h$)", text) for text in arguments):
        return
    names = [key.partition(" ")[2] for key in COMMANDS if key.startswith("evaluate ")]
    asked = name.partition(" ")[2]
    close = difflib.get_close_matches(asked, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UsageError(
        f"no evaluation {asked!r}{hint}; accepted: {', '.join(names)}, or one of a plugin, with a "
        "--config=FILE that names it"
    )


def _say(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Whoever read it (`head`) has enough. Python would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def workdir_path(text: str) -> pathlib.Path:
    """The folder that `--workdir` names.

    Raises:
      UsageError: the address of a bucket.
    """
    if "://" in text:
        raise UsageError(
            f"--workdir={text}: prepared data and metrics need a disk (renames, memory mapping); "
            "accepted: a folder, which may be on NFS or another shared file system. Checkpoints "
            "alone can go to a bucket: --config.train.checkpoint_dir=gs://BUCKET/FOLDER"
        )
    return pathlib.Path(text).expanduser()


def parse(name: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Separates the options of a command from the overrides of config fields.

    Args:
      name: the command.
      arguments: what follows it.

    Returns:
      Values of the options that were given, by name ("help" too), and overrides, each one text.

    Raises:
      UsageError: an option that the command does not have, or a value that it does not accept.
    """
    from absl import flags

    try:
        arguments = flags.FlagValues().read_flags_from_files(list(arguments))
    except flags.Error as error:
        raise UsageError(str(error)) from error
    arguments, overrides = _without_overrides(arguments)
    parser = parser_of(name)
    try:
        options, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(_reason(error)) from error
    folders = [text for text in unknown if not text.startswith("-")]
    if command_of(name).folders is None:
        folders = []
    for text in unknown:
        if text in folders:
            continue
        if not text.startswith("-") or not text.lstrip("-"):
            raise UsageError(f"unexpected argument {text!r}; options start with --")
        flag = text.partition("=")[0]
        raise UsageError(f"unknown option {flag}{_similar_option(flag.lstrip('-'), name)}")
    named = {key.replace("_", "-"): value for key, value in vars(options).items()}
    if folders:
        named["folders"] = folders
    for option, field in field_options(command_of(name)).items():
        if option in named:
            overrides.append(f"--config.{field}={named.pop(option)}")
    return named, overrides


def _without_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that set no field of the config, and those that do, each as one text."""
    others: list[str] = []
    overrides: list[str] = []
    rest = iter(range(len(arguments)))
    for i in rest:
        flag, equals, value = arguments[i].partition("=")
        # As absl has it, one minus sign will do.
        name = re.sub(r"^--?(?=[a-z]{2})", "", flag)
        if name != flag and re.match(r"(no)?config\.", name):
            # A value may follow as the next argument; a minus sign with a digit is a value too.
            following = arguments[i + 1] if i + 1 < len(arguments) else "--"
            if not equals and name.startswith("config.") and re.match(r"[^-]|-\.?\d", following):
                value, equals = following, "="
                next(rest)
            overrides.append(f"--{name}{equals}{value}")
        else:
            others.append(arguments[i] if name == flag else f"--{name}{equals}{value}")
    return others, overrides


def _reason(error: argparse.ArgumentError) -> str:
    """What is wrong with an option's value, in the words of the other messages."""
    option = (error.argument_name or "").rpartition("/")[2]
    if error.message.startswith("="):
        return f"{option}{error.message}"
    if error.message.startswith("ignored explicit argument"):
        return f"{option} takes no value"
    return f"{option} needs a value"


def _similar_option(name: str, command: str) -> str:
    if "." in name:
        return f" (did you mean --config.{name}?)"
    listed = re.findall(r"--([\w-]+)(?![\w.-])", parser_of(command).format_help())
    close = difflib.get_close_matches(name, listed, n=1)
    return f" (did you mean --{close[0]}?)" if close else ""


def _help() -> str:
    summaries = {key: one.summary for key, one in COMMANDS.items() if " " not in key}
    summaries |= {"completion": COMPLETION_SUMMARY, "version": VERSION_SUMMARY}
    listed = "\n".join(f"  {key:<15}{summary}" for key, summary in summaries.items())
    options = parser_of("run").format_help()
    return (
        "usage: attnpo COMMAND --config=FILE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]\n\n"
        "Token-weighted direct preference optimization.\n\n"
        f"Commands (attnpo COMMAND --help tells of each one's options):\n{listed}\n\n"
        f"{options[options.index('Options:') :]}\n"
        "Example:\n"
        "  attnpo run --config=configs/quickstart.py --workdir=/tmp/attnpo \\\n"
        "      --config.objective.name=ipo --config.objective.beta=0.05\n"
    )


def _completion(arguments: list[str]) -> int:
    usage = "attnpo completion bash|zsh"
    if arguments[:1] in (["-h"], ["-help"], ["--help"]):
        how = '  eval "$(attnpo completion bash)"    # in ~/.bashrc'
        return _say(f"usage: {usage}\n\n{COMPLETION_SUMMARY}\n\n{how}")
    if arguments not in (["bash"], ["zsh"]):
        raise UsageError(f"completion {' '.join(arguments)}; accepted: {usage}")
    import shtab

    from attnpo_jax.config.fields import FIELDS

    whole = argparse.ArgumentParser("attnpo", add_help=False)
    groups = {"": whole.add_subparsers()}
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        parser = groups[group].add_parser(last, help=command.summary, add_help=False)
        if any(other.startswith(f"{name} ") for other in COMMANDS):
            groups[name] = parser.add_subparsers()
        add_options(parser, command)
        if command.folders:
            parser.add_argument("WORKDIR", nargs="*").complete = shtab.DIRECTORY
        for field, entry in FIELDS.items():
            parser.add_argument(f"--config.{field}", help=entry.rule.accepted.replace("%", "%%"))
        for action in parser._actions:
            if action.dest in ("config", "flagfile"):
                action.complete = shtab.FILE
            elif action.dest == "workdir":
                action.complete = shtab.DIRECTORY
            elif action.dest == "verbosity":
                action.choices = LEVELS
            elif action.dest == "config.SECTION.FIELD":
                action.help = argparse.SUPPRESS  # the fields themselves are there
    shells = groups[""].add_parser("completion", help=COMPLETION_SUMMARY, add_help=False)
    shells.add_argument("shell", choices=("bash", "zsh"))
    groups[""].add_parser("version", help=VERSION_SUMMARY, add_help=False)
    return _say(shtab.complete(whole, shell=arguments[0]))


def _version(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["-help"], ["--help"]):
        return _say(f"usage: attnpo version\n\n{VERSION_SUMMARY}")
    if arguments:
        raise UsageError(f"version takes no {arguments[0]}; accepted: --help")
    lines = [f"attnpo_jax {attnpo_jax.__version__}", f"python {sys.version.split()[0]}"]
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"):
        lines.append(f"{package} {importlib.metadata.version(package)}")
    return _say("\n".join(lines))
