"""The fields of the evaluations by others' benchmarks: AlpacaEval, MT-Bench, Arena-Hard."""

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field


def _path(help: str) -> Field:
    return Field("", rules.text_or_none(), help)


_ALPACA_EVAL = {
    "annotations": _path(
        "AlpacaEval's annotations.json to score; then nothing is sampled or asked"
    ),
    "reference": _path("the baseline's outputs, which also say the instructions, a JSON list"),
    "outputs": _path("the model's outputs, model_outputs.json; `''`: they are sampled"),
    "prompt": _path("the judge's prompt, the package's alpaca_eval_clf.txt"),
    "annotator": Field(
        "",
        rules.text_or_none(),
        "the annotator's name in the annotations; `''`: the judge's model",
    ),
    "seed": Field(
        0,
        rules.integer(0, 2**31 - 1),
        "of the order in which outputs are shown; the package's is 0",
    ),
    "length_data": _path(
        "the package's df_gamed.csv, or the folder that has it, for the length-controlled win "
        "rate; `''`: there is none"
    ),
}

_MT_BENCH = {
    "judgments": _path(
        "FastChat's judgments of single answers to score; then nothing is sampled or asked"
    ),
    "questions": _path("FastChat's question.jsonl"),
    "answers": _path("the model's answers, both turns; `''`: they are sampled"),
    "references": _path("answers that the judge is shown for math, reasoning and coding"),
    "prompts": _path("the judge's prompts, FastChat's judge_prompts.jsonl"),
    "max_tokens": Field(2048, rules.integer(1, 1_000_000), "tokens of a judgment, at most"),
}

_ARENA_HARD = {
    "judgments": _path(
        "Arena-Hard's judgments to score, a file or a folder of them; then nothing is sampled or "
        "asked"
    ),
    "questions": _path("Arena-Hard's question.jsonl, of v0.1 or v2"),
    "answers": _path("answers, the baseline's too, a file or Arena-Hard's folder model_answer"),
    "judged": Field(
        "",
        rules.text_or_none(),
        "the model in `answers` that is judged; `''`: answers are sampled",
    ),
    "settings": _path("how the judge is asked, Arena-Hard's YAML file of the version"),
    "categories": _path(
        "baselines and system prompts by category, Arena-Hard's utils/judge_utils.py; `''`: as "
        "`settings` says"
    ),
    "baseline": Field(
        "",
        rules.text_or_none(),
        "the baseline; `''`: as judgments or `categories` say, of v0.1 gpt-4-0314",
    ),
    "control": Field(
        "none",
        rules.one_of("none", "length", "markdown", "both"),
        "the style at whose equal values a second win rate is taken",
    ),
}


def _section(name: str, fields: dict[str, Field]) -> dict[str, Field]:
    return {f"evaluate.{name}.{field}": value for field, value in fields.items()}


FIELDS = {
    **_section("alpaca_eval", _ALPACA_EVAL),
    **_section("mt_bench", _MT_BENCH),
    **_section("arena_hard", _ARENA_HARD),
}
