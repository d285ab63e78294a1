"""The command line: `attnpo <command> --config=FILE --workdir=DIR [--config.section.field=value]`.

Parses, checks, and calls; the work is in the modules it calls. Nothing heavy is imported before a
command really runs, so that `attnpo --help` answers at once.
"""

import argparse
import dataclasses
import difflib
import importlib
import importlib.metadata
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

import attnpo_jax
from attnpo_jax.runtime import cache, program
from attnpo_jax.runtime.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of one command alone.

    Attributes:
      keyword: the function's argument that it sets.
      kind: `str` or `int`, which a value is read as; `bool` for an option without a value.
      summary: what it says of itself.
      example: a value, for an option that must be given.
    """

    keyword: str
    kind: type
    summary: str
    example: str | None = None


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command calls, and what it says of itself.

    Attributes:
      module, function: where the function is. It is called with a `Run`, and its options' values by
         keyword.
      summary: what it says of itself.
      options: options of its own, by name.
      workdir: whether its run has one. A command without one runs in a single process.
      section: a section of the config whose fields are options of their own names too; such a
         command needs no config file.
      example: what its help shows as an example.
    """

    module: str
    function: str
    summary: str
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    workdir: Literal["needed", "optional", "none"] = "needed"
    section: str | None = None
    example: str | None = None


COMMANDS = {
    "config": Command(
        "attnpo_jax.config.show",
        "show",
        "Print what the config comes to, each field with what it means.",
        {
            "diff": Option("changed_only", bool, "Print only what differs from the defaults."),
            "json": Option("as_json", bool, "Print JSON."),
        },
        workdir="none",
    ),
    "data": Command(
        "attnpo_jax.prepare.data_report",
        "show",
        "Show what the config's data are: counts, lengths, truncations, bad rows, examples.",
        {"json": Option("as_json", bool, "Print JSON.")},
        workdir="none",
    ),
    "prepare": Command(
        "attnpo_jax.prepare.stage",
        "prepare",
        "Judge every pair and take the reference's log-probabilities, once; resumes.",
    ),
    "train": Command(
        "attnpo_jax.train.stage",
        "train",
        "Train on the prepared pairs; resumes from the newest checkpoint.",
    ),
    "run": Command(
        "attnpo_jax.run",
        "run",
        "prepare, train, evaluate and export, skipping what is done.",
    ),
    "generate": Command(
        "attnpo_jax.generate.stage",
        "generate",
        "Sample responses to prompts, or chat in the terminal; resumes.",
        {
            "model": Option(
                "model",
                str,
                "trained (the newest checkpoint), base (what training starts from), or any HF "
                "folder or hub id [trained where there is a workdir].",
            ),
            "prompts": Option(
                "prompts",
                str,
                "File, hub id or builtin:eval with the prompts; - for standard input [the config's "
                "held-out pairs].",
            ),
            "name": Option("name", str, "Of the samples, WORKDIR/samples/NAME.jsonl."),
            "out": Option("out", str, "The samples file, in place of that."),
            "also": Option(
                "also",
                str,
                "Files for benchmarks too: alpaca-eval, mt-bench, arena-hard, with commas between.",
            ),
            "interactive": Option("interactive", bool, "Chat in the terminal."),
        },
        workdir="optional",
        section="generate",
        example="attnpo generate --model=smollm2-135m-instruct --prompts=builtin:eval \\\n"
        "      --out=samples.jsonl --temperature=0 --max-new-tokens=64",
    ),
    "serve": Command(
        "attnpo_jax.generate.server",
        "serve",
        "Answer the calls of OpenAI's API, chats and completions, on this machine.",
        {"model": Option("model", str, "Which model, as for `generate`.")},
        workdir="optional",
        section="serve",
        example="attnpo serve --model=smollm2-135m-instruct --port=8000",
    ),
    "export-weights": Command(
        "attnpo_jax.export.weights",
        "export_weights",
        "Write pairs and judge's weights as the method's authors publish them, workdir/weights.",
    ),
    "export": Command(
        "attnpo_jax.export.stage",
        "export",
        "Write the newest checkpoint as a Hugging Face folder, workdir/export.",
    ),
    "plan": Command(
        "attnpo_jax.plan.stage",
        "plan",
        "Compile the run for a TPU slice that need not be there: memory, traffic, time.",
        {
            "topology": Option(
                "topology", str, "TPU slice, e.g. v5e:8x8, v5p:2x2x4, v6e:4x4.", example="v5e:8x8"
            ),
            "pairs": Option("pairs", int, "Training pairs, where they can't be counted here."),
            "row-length": Option(
                "row_length", int, "Tokens of prompt and both responses [the most there can be]."
            ),
            "response-length": Option("response_length", int, "Tokens of each response."),
            "search": Option(
                "search_over", bool, "Try and rank meshes, microbatch sizes and remat policies."
            ),
            "json": Option("as_json", bool, "Print JSON."),
        },
        workdir="none",
    ),
}
COMPLETION_SUMMARY = "Print a script that completes commands and options in bash or zsh."
VERSION_SUMMARY = "Print the versions of attnpo_jax and of the libraries it computes with."

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
      argv: the arguments after the program's name; None: the process's own.

    Returns:
      Exit code, as `runtime.program.exit_code` says.

    Raises:
      Exception: whatever is not expected, with its traceback.
    """
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
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"unknown command {name!r}{hint}; commands: {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    options, overrides = parse(name, arguments)
    if "help" in options:
        return _say(_parser(name).format_help())
    for required, example in _needed(command).items():
        if not options.get(required):
            raise UsageError(f"{name} needs --{required}={example}")
    workdir = workdir_path(options["workdir"]) if options.get("workdir") else None
    program.start_logging(options.get("verbosity") or "info")
    if command.workdir != "none":
        # Before config files and plugins, which may ask for devices.
        from attnpo_jax.parallel import failures

        failures.join({name: options[name] for name in PROCESS_OPTIONS if name in options})

    from attnpo_jax import config
    from attnpo_jax.run import Run

    run = Run.resolve(config.load_config(options.get("config"), overrides), workdir)
    cache.keep_compiled_programs()
    own = {option.keyword: options[k] for k, option in command.options.items() if k in options}
    getattr(importlib.import_module(command.module), command.function)(run, **own)
    return 0


def _needed(command: Command) -> dict[str, str]:
    """The options that a command needs, with an example each."""
    needed = {} if command.section else {"config": "configs/quickstart.py"}
    if command.workdir == "needed":
        needed["workdir"] = "DIR"
    return needed | {k: option.example for k, option in command.options.items() if option.example}


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
    parser = _parser(name)
    try:
        options, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(_reason(error)) from error
    for text in unknown:
        if not text.startswith("-") or not text.lstrip("-"):
            raise UsageError(f"unexpected argument {text!r}; options start with --")
        flag = text.partition("=")[0]
        raise UsageError(f"unknown option {flag}{_similar_option(flag.lstrip('-'), name)}")
    named = {key.replace("_", "-"): value for key, value in vars(options).items()}
    section = COMMANDS[name].section
    if section is not None:
        from attnpo_jax.config.fields import FIELDS

        for field in FIELDS:
            option = field.removeprefix(f"{section}.").replace("_", "-")
            if field.startswith(f"{section}.") and option in named:
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


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong, for `program.exit_code` to tell."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Formatter(argparse.HelpFormatter):
    """Shows options as --option=VALUE, as they are written here."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = f"={action.metavar}" if action.nargs is None else ""
        return ", ".join(f"{flag}{value}" for flag in action.option_strings)


def _parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command's options; overrides of config fields are taken out before."""
    command = COMMANDS[name]
    metavars = {"config": "FILE", "workdir": "DIR"}
    needed = "".join(f" --{key}={metavars.get(key, key.upper())}" for key in _needed(command))
    example = "" if command.example is None else f"\n\nexample:\n  {command.example}"
    parser = _Parser(
        f"attnpo {name}",
        usage=f"attnpo {name}{needed} [--config.SECTION.FIELD=VALUE ...]{example}",
        description=command.summary,
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    _add_options(parser, command)
    return parser


def _add_options(parser: argparse.ArgumentParser, command: Command) -> None:
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
            kind = _count if option.kind is int else _given
            metavar = key.upper().rpartition("-")[2]
            add(f"--{key}", metavar=metavar, type=kind, help=option.summary)
    if command.section is not None:
        _add_fields(parser, command.section)
    if command.workdir != "none":
        add(
            "--workdir",
            metavar="DIR",
            type=_given,
            help="Folder of everything that is written: config.json, prepared/, checkpoints/, "
            "metrics.jsonl, export/.",
        )
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


def _add_fields(parser: argparse.ArgumentParser, section: str) -> None:
    """The fields of a section as options."""
    from attnpo_jax.config.fields import FIELDS

    add = parser.add_argument_group(f"Fields of config.{section}").add_argument
    for name, field in FIELDS.items():
        if name.startswith(f"{section}."):
            option = name.partition(".")[2].replace("_", "-")
            text = f"{field.help} [{field.default!r}].".replace("%", "%%")
            add(f"--{option}", metavar="VALUE", type=_given, help=text)


def _given(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("needs a value")
    return text


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"={text}; accepted: a number from 1 up")
    return int(text)


def _level(text: str) -> str:
    if _given(text) not in LEVELS:
        raise argparse.ArgumentTypeError(f"={text}; accepted: {', '.join(LEVELS)}")
    return text


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
    listed = re.findall(r"--([\w-]+)(?![\w.-])", _parser(command).format_help())
    close = difflib.get_close_matches(name, listed, n=1)
    return f" (did you mean --{close[0]}?)" if close else ""


def _help() -> str:
    summaries = {key: command.summary for key, command in COMMANDS.items()}
    summaries |= {"completion": COMPLETION_SUMMARY, "version": VERSION_SUMMARY}
    listed = "\n".join(f"  {key:<15}{summary}" for key, summary in summaries.items())
    options = _parser("run").format_help()
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
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        parser = commands.add_parser(name, help=command.summary, add_help=False)
        _add_options(parser, command)
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
    shells = commands.add_parser("completion", help=COMPLETION_SUMMARY, add_help=False)
    shells.add_argument("shell", choices=("bash", "zsh"))
    commands.add_parser("version", help=VERSION_SUMMARY, add_help=False)
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


if __name__ == "__main__":
    sys.exit(main())
