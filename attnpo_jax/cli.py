"""The command line: `attnpo <command> --config=FILE --workdir=DIR [--config.section.field=value]`.

Parses, checks, and calls; the work is in the modules it calls. Nothing heavy is imported before a
command really runs, so that `attnpo --help` answers at once.
"""

import argparse
import dataclasses
import difflib
import importlib
import importlib.metadata
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import attnpo_jax
from attnpo_jax.runtime import exit_codes
from attnpo_jax.runtime.errors import UserError


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
         keyword; a command with options of its own writes nothing, and its run has no workdir.
      summary: what it says of itself.
      options: options of its own, by name.
    """

    module: str
    function: str
    summary: str
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)


COMMANDS = {
    "config": Command(
        "attnpo_jax.config.show",
        "show",
        "Print what the config comes to, each field with what it means.",
        {
            "diff": Option("changed_only", bool, "Print only what differs from the defaults."),
            "json": Option("as_json", bool, "Print JSON."),
        },
    ),
    "data": Command(
        "attnpo_jax.prepare.data_report",
        "data_report",
        "Show what the config's data are: counts, lengths, truncations, bad rows, examples.",
        {"json": Option("as_json", bool, "Print JSON.")},
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


class UsageError(UserError):
    """A command line that cannot be understood."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
      argv: the arguments after the program's name; None: the process's own.

    Returns:
      Exit code: 0, or one of `runtime.exit_codes`: 1 for an error that the user can mend (told in
      one message on stderr), 2 for a command line that cannot be understood, 75 when preparing
      or training was told to stop (SIGTERM) and its work is saved, 130 when interrupted. With 76,
      since another process of the run is gone, it does not come back here.

    Raises:
      Exception: whatever is not expected, with its traceback.
    """
    return exit_code("attnpo", lambda: _main(sys.argv[1:] if argv is None else list(argv)))


def exit_code(program: str, body: Callable[[], int]) -> int:
    """Runs a program, and tells what stopped it in one message where that says what to mend.

    Args:
      program: its name, for the message.
      body: the program; returns an exit code.

    Returns:
      As `main`.

    Raises:
      Exception: whatever is not expected.
    """
    try:
        try:
            code = body()
        except Exception as error:
            if not _is_preempted(error):
                raise
            print(f"{program}: {error}", file=sys.stderr)
            code = exit_codes.PREEMPTED
        if processes := _several():
            # JAX's own farewell gives up, and ends those that work, after half a minute.
            processes.barrier("all are done")
        return code
    except UsageError as error:
        _fail_with_others(program, error, expected=True, code=exit_codes.USAGE)
        print(f"{program}: error: {error}\n(see {program} --help)", file=sys.stderr)
        return exit_codes.USAGE
    except KeyboardInterrupt:
        error = KeyboardInterrupt("interrupted")
        _fail_with_others(program, error, expected=True, code=exit_codes.INTERRUPTED)
        print(f"{program}: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except Exception as error:
        _fail_with_others(program, error, expected=_is_expected(error), code=exit_codes.FAILED)
        if not _is_expected(error):
            raise
        print(f"{program}: error: {error}", file=sys.stderr)
        return exit_codes.FAILED


def _several() -> Any:
    """`attnpo_jax.parallel.processes` where this is one of several processes, else None."""
    processes = sys.modules.get("attnpo_jax.parallel.processes")
    return processes if processes is not None and processes.are_several() else None


def _fail_with_others(program: str, error: BaseException, **how: Any) -> None:
    """Of several processes, ends this one and tells the others why; else returns."""
    if _several():
        from attnpo_jax.parallel import failures

        failures.fail(program, error, **how)


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
    needed = {"config": "configs/quickstart.py"} | _needed(command)
    for required, example in needed.items():
        if not options.get(required):
            raise UsageError(f"{name} needs --{required}={example}")
    workdir = None if command.options else workdir_path(options["workdir"])
    start_logging(options.get("verbosity") or "info")
    if not command.options:
        # Before config files and plugins, which may ask for devices.
        _join_processes({name: options[name] for name in PROCESS_OPTIONS if name in options})

    from attnpo_jax.run import Run

    run = Run.resolve(load_config(options["config"], overrides), workdir)
    use_compilation_cache()
    own = {option.keyword: options[k] for k, option in command.options.items() if k in options}
    getattr(importlib.import_module(command.module), command.function)(run, **own)
    return 0


def _needed(command: Command) -> dict[str, str]:
    """The options that a command needs beside the config, with an example each."""
    if not command.options:
        return {"workdir": "DIR"}
    return {key: option.example for key, option in command.options.items() if option.example}


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


def load_config(spec: str, overrides: Sequence[str] = ()) -> Any:
    """The config of a file, changed as a command line says.

    Overrides of `weighting.name` and `objective.name` come first, whatever their place: they
    switch the section to that function's hyperparameters, which others may then set. Values of
    hyperparameters that the old and the new function share are kept.

    Args:
      spec: path of a config file, or `path:argument`.
      overrides: `--config.section.field=value`, as on the command line.

    Returns:
      A ConfigDict, not validated yet.

    Raises:
      UsageError: a field that does not exist, or a value that is not of its type.
      ConfigError, FileNotFoundError: see `attnpo_jax.config.load_file` and `complete_sections`.
    """
    from attnpo_jax import config as config_lib

    config = config_lib.load_file(spec)
    by_field: dict[str, list[str]] = {}
    for override in overrides:
        by_field.setdefault(_field(override), []).append(override)

    config = _apply(config, by_field.get("plugins", []))
    switched = {}
    for section in config_lib.SECTIONS:
        for override in by_field.get(f"{section}.name", []):
            switched[section] = override.partition("=")[2]
    config = config_lib.complete_sections(config, **switched)

    known = list(config_lib.flatten(config))
    for field in by_field:
        if field not in known:
            raise UsageError(_unknown_field(field, known))
    return _apply(config, list(overrides))


def _unknown_field(field: str, known: Sequence[str]) -> str:
    from attnpo_jax.config.checks import suggest

    inside = [k for k in known if k.startswith(f"{field}.")]
    if inside:
        listed = ", ".join(f"--config.{k}" for k in inside)
        return f"--config.{field} is a section; set its fields: {listed}"
    section = field.rpartition(".")[0]
    beside = [k for k in known if section and k.rpartition(".")[0] == section]
    listed = f"; fields of config.{section}: " + ", ".join(k.rpartition(".")[2] for k in beside)
    return f"--config.{field}: unknown field{suggest(field, known)}{listed if beside else ''}"


def _apply(config: Any, overrides: list[str]) -> Any:
    from absl import flags
    from ml_collections import config_flags

    arguments = ["attnpo", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except flags.Error as error:
        if len(overrides) > 1:
            # Which one it is, absl does not say.
            for override in overrides:
                _apply(config, [override])
        raise UsageError(_refused(config, overrides[0], str(error))) from error
    return values["config"].value


def _refused(config: Any, override: str, reason: str) -> str:
    from attnpo_jax.config.checks import accepted_words

    if "=" not in override:
        return f"{override} needs a value; {reason}"
    return f"{override}: accepted: {accepted_words(config, _field(override))}"


def _field(override: str) -> str:
    return re.sub(r"^--?(no)?config\.", "", override.partition("=")[0])


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
    return {key.replace("_", "-"): value for key, value in vars(options).items()}, overrides


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
    """Raises what is wrong, for `exit_code` to tell."""

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
    needed = "".join(f" --{key}={key.upper()}" for key in _needed(command) if key != "workdir")
    workdir = "" if command.options else " --workdir=DIR"
    parser = _Parser(
        f"attnpo {name}",
        usage=f"attnpo {name} --config=FILE{workdir}{needed} [--config.SECTION.FIELD=VALUE ...]",
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
        help="Config file, a Python file with get_config(); ARG is its argument.",
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
    if not command.options:
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


def _is_preempted(error: Exception) -> bool:
    preemption = sys.modules.get("attnpo_jax.parallel.preemption")
    return preemption is not None and isinstance(error, preemption.Preempted)


def _is_expected(error: Exception) -> bool:
    """Whether the message alone tells the user what to mend."""
    return isinstance(error, (UserError, OSError))


def start_logging(level: str = "info") -> None:
    """Lines of log on stderr: the package's own from `level` on, others' from warnings on."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    # That it found no PyTorch, which nothing here needs, is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # The libraries' own notes would drown ours; their warnings are wanted.
    logging.getLogger("attnpo_jax").setLevel(level.upper())


def _join_processes(options: Mapping[str, str]) -> None:
    """Makes this process one of several where options or environment say so; the first speaks.

    Args:
      options: those of `PROCESS_OPTIONS` that were given.

    Raises:
      ProcessesError: see `attnpo_jax.parallel.processes.find`.
    """
    from attnpo_jax.parallel import failures, processes

    processes.initialize(options=options)
    if processes.are_several():
        failures.watch()
        if not processes.is_first():
            # What all would say, the first one says; what this one alone knows, it says itself.
            logging.getLogger("attnpo_jax").setLevel(logging.WARNING)


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, where `$JAX_COMPILATION_CACHE_DIR` says or at home."""
    import jax

    from attnpo_jax.models.io import embedded

    if jax.config.jax_compilation_cache_dir is None:
        folder = embedded.default_cache_dir() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logging.getLogger("attnpo_jax").warning(
                "compiled programs are not kept (%s); $JAX_COMPILATION_CACHE_DIR or $ATTNPO_CACHE "
                "may name a folder that can be written",
                error,
            )
            return
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))


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

    program = argparse.ArgumentParser("attnpo", add_help=False)
    commands = program.add_subparsers()
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
    return _say(shtab.complete(program, shell=arguments[0]))


def _version(arguments: list[str]) -> int:
    if not arguments:
        return _say(_versions())
    if arguments[0] in ("-h", "-help", "--help"):
        return _say(f"usage: attnpo version\n\n{VERSION_SUMMARY}")
    raise UsageError(f"version takes no {arguments[0]}; accepted: --help")


def _versions() -> str:
    lines = [f"attnpo_jax {attnpo_jax.__version__}", f"python {sys.version.split()[0]}"]
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"):
        lines.append(f"{package} {importlib.metadata.version(package)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
