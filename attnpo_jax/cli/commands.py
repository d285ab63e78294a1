"""The table of commands, each with what it calls and its options."""

import dataclasses
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of one command alone.

    Attributes:
      keyword: the function's argument that it sets.
      kind: `str` or `int`, which a value is read as; `bool` for an option without a value.
      summary: what it says of itself.
      example: a value, for an option that must be given.
      repeated: whether it may be given several times; the argument is then a list of the values.
      least: the smallest number of an `int`.
    """

    keyword: str
    kind: type
    summary: str
    example: str | None = None
    repeated: bool = False
    least: int = 1


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command calls, and what it says of itself.

    Attributes:
      module, function: where the function is. It is called with a `Run`, and its options' values by
         keyword.
      summary: what it says of itself.
      options: options of its own, by name.
      workdir: whether its run has one. A command without one runs in a single process.
      needs_config: whether it needs a config file.
      sections: sections of the config whose fields are options too, each with what their names
         begin with there.
      example: what its help shows as an example.
      given: further arguments of the function.
      alone: whether it has a workdir, but runs in a single process all the same.
      folders: the argument of the function that takes folders named without an option; None where
        there are none.
    """

    module: str
    function: str
    summary: str
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    workdir: Literal["needed", "optional", "none"] = "needed"
    needs_config: bool = True
    sections: Mapping[str, str] = dataclasses.field(default_factory=dict)
    example: str | None = None
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    alone: bool = False
    folders: str | None = None


def _evaluation(
    name: str,
    summary: str,
    options: Mapping[str, Option],
    *,
    judged: bool = False,
    example: str | None = None,
) -> Command:
    """One of the evaluations, whose config section's fields are its options.

    Args:
      judged: whether `config.evaluate.judge` is about it too.
    """
    section = f"evaluate.{name.replace('-', '_')}"
    return Command(
        "attnpo_jax.evaluate.stage",
        "evaluate",
        summary,
        options,
        workdir="optional",
        needs_config=False,
        sections={section: ""} | ({"evaluate.judge": "judge-"} if judged else {}),
        example=example,
        given={"name": name},
    )


_JSON = Option("as_json", bool, "Print JSON.")
_OF_FILES = {
    "name": Option("label", str, "What the files are called, in place of the model's name."),
    "out": Option("out", str, "Folder of the files, in place of WORKDIR/evaluations/NAME."),
    "json": _JSON,
}
_OF_A_MODEL = {
    "model": Option(
        "model",
        str,
        "trained (the best checkpoint by config.train.keep_best, if that is set, else the newest), "
        "trained@STEP, trained@best, trained@newest, base (what training starts from), or any HF "
        "folder or hub id [trained where there is a workdir].",
    ),
    **_OF_FILES,
}

_STEP = Option(
    "step",
    str,
    "Which checkpoint: its step, best (by config.train.keep_best), or newest [the best, if that is "
    "set, else the newest].",
)


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
    "probe": Command(
        "attnpo_jax.probe.stage",
        "probe",
        "Show where the model looks as it judges, on pairs whose differences are marked; resumes.",
        {
            "model": Option(
                "model",
                str,
                "base (what training starts from), trained, trained@STEP, trained@best, or any HF "
                "folder or hub id [base].",
            ),
            "pairs": Option(
                "pairs", str, "Marked pairs of your own: a file or hub id [builtin:planted]."
            ),
            "by": Option(
                "by", str, "Column of the pairs; figures are also given for each value [subset]."
            ),
            "out": Option("out", str, "Folder of figures and plot [WORKDIR/probe/MODEL]."),
            "json": _JSON,
        },
        workdir="optional",
        needs_config=False,
        alone=True,
        example="attnpo probe --model=smollm2-135m-instruct",
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
        {"step": _STEP},
    ),
    "generate": Command(
        "attnpo_jax.generate.stage",
        "generate",
        "Sample responses to prompts, or chat in the terminal; resumes.",
        {
            "model": _OF_A_MODEL["model"],
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
        needs_config=False,
        sections={"generate": ""},
        example="attnpo generate --model=smollm2-135m-instruct --prompts=builtin:eval \\\n"
        "      --out=samples.jsonl --temperature=0 --max-new-tokens=64",
    ),
    "serve": Command(
        "attnpo_jax.generate.server",
        "serve",
        "Answer the calls of OpenAI's API, chats and completions, on this machine.",
        {"model": Option("model", str, "Which model, as for `generate`.")},
        workdir="optional",
        needs_config=False,
        sections={"serve": ""},
        example="attnpo serve --model=smollm2-135m-instruct --port=8000",
    ),
    "evaluate": Command(
        "attnpo_jax.evaluate.stage",
        "evaluate",
        "Evaluate the trained model and the one it started from, as config.evaluate.names says; or "
        "one evaluation, evaluate NAME.",
        {"json": _JSON},
        example="attnpo evaluate checks --model=smollm2-135m-instruct --out=checks",
    ),
    "evaluate checks": _evaluation(
        "checks",
        "How often do responses do what prompts ask of their form: verifiable, without a judge.",
        _OF_A_MODEL,
        example="attnpo evaluate checks --model=smollm2-135m-instruct --out=checks --count=20",
    ),
    "evaluate pairs": _evaluation(
        "pairs",
        "How often is the implicit reward of the better response higher, on held-out pairs.",
        _OF_A_MODEL,
        example="attnpo evaluate pairs --model=smollm2-135m-instruct --out=pairs --subset=failure",
    ),
    "evaluate alpaca-eval": _evaluation(
        "alpaca-eval",
        "Score AlpacaEval's annotations, length-controlled too; or make them first, with a judge.",
        _OF_A_MODEL,
        judged=True,
        example="attnpo evaluate alpaca-eval --annotations=annotations.json \\\n"
        "      --length-data=df_gamed.csv",
    ),
    "evaluate mt-bench": _evaluation(
        "mt-bench",
        "Score MT-Bench's judgments, by turn and category; or make them first, with a judge.",
        _OF_A_MODEL,
        judged=True,
        example="attnpo evaluate mt-bench --judgments=gpt-4_single.jsonl \\\n"
        "      --questions=question.jsonl",
    ),
    "evaluate arena-hard": _evaluation(
        "arena-hard",
        "Score Arena-Hard's judgments, of v0.1 or v2; or make them first, with a judge.",
        _OF_A_MODEL,
        judged=True,
        example="attnpo evaluate arena-hard --judgments=model_judgment/gpt-4.1 \\\n"
        "      --answers=model_answer --control=both",
    ),
    "evaluate versus": _evaluation(
        "versus",
        "Hold a model's answers against another one's, judged pair by pair in both orders.",
        _OF_A_MODEL,
        judged=True,
        example="attnpo evaluate versus --config=configs/quickstart.py --workdir=DIR \\\n"
        "      --baseline=base",
    ),
    "evaluate harness": _evaluation(
        "harness",
        "Tasks of lm-evaluation-harness; needs the extra lm_eval.",
        _OF_A_MODEL,
        example="attnpo evaluate harness --model=smollm2-135m-instruct --tasks=arc_easy --out=arc",
    ),
    "evaluate report": Command(
        "attnpo_jax.evaluate.report",
        "report",
        "Show all evaluations of some workdirs, with paired differences between models.",
        {
            "workdirs": Option("workdirs", str, "Folders, with commas between [the --workdir]."),
            "baseline": Option(
                "baseline",
                str,
                "The model that others are held against, as the table calls it [base].",
            ),
            "json": _JSON,
        },
        workdir="optional",
        needs_config=False,
        example="attnpo evaluate report --workdirs=runs/a,runs/b --baseline=a/base",
    ),
    "export-weights": Command(
        "attnpo_jax.export.weights",
        "export_weights",
        "Write pairs and judge's weights as the method's authors publish them, workdir/weights.",
    ),
    "export": Command(
        "attnpo_jax.export.stage",
        "export",
        "Write a checkpoint as a Hugging Face folder, workdir/export.",
        {"step": _STEP},
    ),
    "report": Command(
        "attnpo_jax.report.stage",
        "command",
        "Write a page of a run, WORKDIR/report.html, or of several; or show weights in colour.",
        {
            "out": Option("out", str, "The page's file, in place of that."),
            "pairs": Option(
                "pairs", int, "Pairs shown token by token, at most [config.report.pairs].", least=0
            ),
            "tokens": Option("tokens", bool, "Write no page: show pairs' weights in the terminal."),
            "weighting": Option(
                "weighting", str, "With --tokens: a registered weighting [the run's own]."
            ),
            "run-plugins": Option(
                "run_plugins", bool, "Run the Python files that a WORKDIR names as its plugins."
            ),
        },
        workdir="optional",
        needs_config=False,
        alone=True,
        folders="workdirs",
        example="attnpo report runs/quickstart",
    ),
    "sweep": Command(
        "attnpo_jax.sweep.stage",
        "sweep",
        "Train a grid of configs on one prepared dataset, and compare what comes of them; resumes.",
        {
            "set": Option(
                "axes",
                str,
                "FIELD=VALUE,VALUE,... is an axis of the grid; any number of these.",
                repeated=True,
            ),
            "variant": Option(
                "variants",
                str,
                'NAME="FIELD=VALUE FIELD=VALUE ..." is one of the variants, which are an axis '
                "together; any number of these.",
                repeated=True,
            ),
            "index": Option(
                "index",
                int,
                "Only the run of this number, from 0, for one task of an array of jobs.",
                least=0,
            ),
            "at-once": Option("at_once", int, "Runs at a time, each in a process of its own [1]."),
            "checkpoints": Option(
                "checkpoints",
                str,
                "What finished runs keep: keep (what training keeps), drop (none), or best (the "
                "best alone, by config.train.keep_best) [keep].",
            ),
            "baseline": Option(
                "baseline", str, "What others are held against, as the table calls it [the first]."
            ),
            "metric": Option(
                "metrics",
                str,
                "EVALUATION/FIGURE to compare, in place of the usual ones; any number of these. "
                "The first orders the variants, the highest first, or the lowest after min:.",
                repeated=True,
            ),
            "show": Option("only_show", bool, "Run nothing: show what is finished."),
            "json": _JSON,
        },
        alone=True,
        example="attnpo sweep --config=configs/quickstart.py --workdir=DIR --set=seed=0,1,2 \\\n"
        '      --variant=dpo="weighting.name=uniform" --variant=mid="weighting.layer=14"',
    ),
    "iterate": Command(
        "attnpo_jax.iterate.stage",
        "iterate",
        "Rounds on the model's own answers: sample, label, pair, judge, train, evaluate; resumes.",
        example="attnpo iterate --config=configs/iterate_checks.py --workdir=runs/iterate",
    ),
    "plan": Command(
        "attnpo_jax.plan.stage",
        "plan",
        "Compile the run for TPUs or GPUs that need not be there: memory, traffic, time.",
        {
            "topology": Option(
                "topology",
                str,
                "TPU slice, e.g. v5e:8x8, v5p:2x2x4; or GPUs, e.g. h100:8, or by host h100:4x8.",
                example="v5e:8x8",
            ),
            "pairs": Option("pairs", int, "Training pairs, where they can't be counted here."),
            "row-length": Option(
                "row_length", int, "Tokens of prompt and both responses [the most there can be]."
            ),
            "response-length": Option("response_length", int, "Tokens of each response."),
            "search": Option(
                "search_over", bool, "Try and rank meshes, microbatch sizes and remat policies."
            ),
            "generate": Option(
                "generates", bool, "Plan sampling, as config.generate says, in place of training."
            ),
            "json": Option("as_json", bool, "Print JSON."),
        },
        workdir="none",
    ),
}


def command_of(name: str) -> Command:
    """The command of a name; `evaluate NAME` for an evaluation that a config's plugins have.

    Raises:
      KeyError: there is none.
    """
    first, _, evaluation = name.partition(" ")
    if name not in COMMANDS and first == "evaluate":
        summary = f"The evaluation {evaluation} of the config's plugins."
        command = _evaluation(evaluation, summary, _OF_A_MODEL)
        return dataclasses.replace(command, sections={}, needs_config=True)
    return COMMANDS[name]
