"""The command line: `attnpo <command> --config=FILE --workdir=DIR [--config.section.field=value]`.

Parses, checks, and calls; the work is in the modules it calls. Nothing heavy is imported before a
command really runs, so that `attnpo --help` answers at once.
"""

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
from typing import Any

import attnpo_jax
from attnpo_jax.runtime import exit_codes


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
      module, function: where the function is. It is called with (config, workdir); with the config
         and its options' values by keyword if it has options of its own, since then it writes
         nothing.
      summary: what it says of itself.
      options: options of its own, by name.
    """

    module: str
    function: str
    summary: str
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)


COMMANDS = {
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
        "attnpo_jax.train.loop",
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
VERSION_SUMMARY = "Print the versions of attnpo_jax and of the libraries it computes with."

OPTIONS = """\
Options:
  --config=FILE[:ARG]           Config file, a Python file with get_config(); ARG is its argument.
  --config.SECTION.FIELD=VALUE  Set one field of the config; any number of these.
  --workdir=DIR                 Folder of everything that is written: config.json, prepared/,
                                checkpoints/, metrics.jsonl, export/.
  --coordinator-address=HOST:PORT, --num-processes=N, --process-id=I
                                Where process 0 of a run of N processes listens, and which one this
                                is; needed only where the environment does not say.
  --json                        Print JSON instead of tables (data only).
  --verbosity=LEVEL             debug, info (default), warning or error.
  --flagfile=FILE               Read further options from a file, one a line.
  --help                        Print this.
"""
LEVELS = ("debug", "info", "warning", "error")
VALUE_OPTIONS = ("config", "workdir", "verbosity", "flagfile")
# Those of commands that several processes may run; named as `jax.distributed.initialize` has them.
PROCESS_OPTIONS = ("coordinator-address", "num-processes", "process-id")


class UsageError(ValueError):
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
        return _say(_versions())
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"unknown command {name!r}{hint}; commands: {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    options, overrides = _split(arguments, command.options)
    if "help" in options:
        return _say(_help(name))
    needed = {"config": "configs/quickstart.py"} | _needed(command)
    for required, example in needed.items():
        if not options.get(required):
            raise UsageError(f"{name} needs --{required}={example}")
    workdir = None if command.options else workdir_path(options["workdir"])
    start_logging(options.get("verbosity") or "info")
    if not command.options:
        # Before config files and plugins, which may ask for devices.
        _join_processes({name: options[name] for name in PROCESS_OPTIONS if name in options})

    from attnpo_jax import config as config_lib

    config = load_config(options["config"], overrides)
    config_lib.validate(config)
    use_compilation_cache()
    function = getattr(importlib.import_module(command.module), command.function)
    if command.options:
        own = {key: options[key] for key in command.options if key in options}
        keywords = {command.options[k].keyword: _value(command, k, text) for k, text in own.items()}
        function(config, **keywords)
    else:
        function(config, workdir)
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


def _value(command: Command, name: str, text: str) -> Any:
    """The value of a command's own option."""
    kind = command.options[name].kind
    if kind is int and not re.fullmatch(r"[1-9]\d*", text):
        raise UsageError(f"--{name}={text}; accepted: a number from 1 up")
    return True if kind is bool else kind(text)


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
        raise UsageError(str(error)) from error
    return values["config"].value


def _field(override: str) -> str:
    return re.sub(r"^--?(no)?config\.", "", override.partition("=")[0])


def _split(arguments: list[str], own: Mapping[str, Option]) -> tuple[dict[str, str], list[str]]:
    """Separates the options from the overrides of config fields.

    Args:
      arguments: what follows the command.
      own: the options of that command alone.

    Returns:
      Values of the options by name ("help" has ""), and overrides, each one string.
    """
    from absl import flags

    try:
        arguments = flags.FlagValues().read_flags_from_files(arguments)
    except flags.Error as error:
        raise UsageError(str(error)) from error
    options: dict[str, str] = {}
    overrides: list[str] = []
    flags_ = [key for key, option in own.items() if option.kind is bool]
    valued = [*VALUE_OPTIONS, *(key for key in own if key not in flags_)]
    valued += () if own else PROCESS_OPTIONS
    if own:
        valued.remove("workdir")
    rest = iter(range(len(arguments)))
    for i in rest:
        flag, equals, value = arguments[i].partition("=")
        if not flag.startswith("-") or not flag.lstrip("-"):
            raise UsageError(f"unexpected argument {arguments[i]!r}; options start with --")
        name = flag.lstrip("-")
        # As absl has it, a value may follow as the next argument. A minus sign with a digit is a
        # value too.
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        takes_next = name in valued or name.startswith("config.")
        if not equals and takes_next and re.match(r"[^-]|-\.?\d", following):
            value, equals = following, "="
            next(rest)
        if re.match(r"(no)?config\.", name):
            overrides.append(f"--{name}{equals}{value}")
        elif name in ("help", "h"):
            options["help"] = ""
        elif name in flags_ and not equals:
            options[name] = ""
        elif name in flags_:
            raise UsageError(f"{flag} takes no value")
        elif name not in valued:
            raise UsageError(f"unknown option {flag}{_similar_option(name, [*valued, *flags_])}")
        elif not value:
            raise UsageError(f"{flag} needs a value")
        elif name == "verbosity" and value not in LEVELS:
            raise UsageError(f"--verbosity={value}; accepted: {', '.join(LEVELS)}")
        else:
            options[name] = value
    return options, overrides


def _similar_option(name: str, known: Sequence[str]) -> str:
    if "." in name:
        return f" (did you mean --config.{name}?)"
    close = difflib.get_close_matches(name, (*known, "help"), n=1)
    return f" (did you mean --{close[0]}?)" if close else ""


def _is_preempted(error: Exception) -> bool:
    preemption = sys.modules.get("attnpo_jax.parallel.preemption")
    return preemption is not None and isinstance(error, preemption.Preempted)


def _is_expected(error: Exception) -> bool:
    """Whether the message alone tells the user what to mend.

    So it is for the errors this package defines, those of files and network, and the ValueErrors
    it raises itself. A ValueError from inside a library is a bug here, and keeps its traceback.
    """
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] == "attnpo_jax":
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_in = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return isinstance(error, ValueError) and raised_in.split(".")[0] == "attnpo_jax"


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


def _help(name: str | None = None) -> str:
    if name is not None:
        command = COMMANDS[name]
        own, common = "", OPTIONS
        for key, option in command.options.items():
            shown = f"--{key}" if option.kind is bool else f"--{key}={key.upper()[:8]}"
            own += f"  {shown:<30}{option.summary}\n"
        if own:
            # It writes nothing.
            common = re.sub(r"  --workdir(.|\n)*?(?=  --)", "", OPTIONS)
            common = re.sub(r"  --coordinator-address(.|\n)*?(?=  --json)", "", common)
        needed = " ".join(f"--{key}={key.upper()}" for key in _needed(command))
        needed = needed.replace("WORKDIR", "DIR") or "[--json]"
        usage = f"Usage: attnpo {name} --config=FILE {needed} [--config.SECTION.FIELD=VALUE ...]"
        return f"{usage}\n\n{command.summary}\n\n{common}{own}"
    summaries = {key: command.summary for key, command in COMMANDS.items()}
    summaries["version"] = VERSION_SUMMARY
    listed = "\n".join(f"  {key:<15}{summary}" for key, summary in summaries.items())
    return (
        "Usage: attnpo COMMAND --config=FILE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]\n\n"
        "Token-weighted direct preference optimization.\n\n"
        f"Commands:\n{listed}\n\n{OPTIONS}\n"
        "Example:\n"
        "  attnpo run --config=configs/quickstart.py --workdir=/tmp/attnpo \\\n"
        "      --config.objective.name=ipo --config.objective.beta=0.05\n"
    )


def _versions() -> str:
    lines = [f"attnpo_jax {attnpo_jax.__version__}", f"python {sys.version.split()[0]}"]
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"):
        lines.append(f"{package} {importlib.metadata.version(package)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
