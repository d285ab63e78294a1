"""A small made-up set in the forms of Arena-Hard's files, in both layouts."""

import json
import random

LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
MODELS = ("first", "second")
BASELINE = "base"


def metadata(rng):
    return {
        "token_len": rng.randrange(20, 600),
        "header_count": {"h1": rng.randrange(2), "h2": rng.randrange(4)},
        "list_count": {"ordered": rng.randrange(5), "unordered": rng.randrange(6)},
        "bold_count": {"**": rng.randrange(7), "__": 0},
    }


def answers(model, questions, old):
    rng = random.Random(f"answers of {model}")
    rows = []
    for k in range(questions):
        style = metadata(rng)
        if old:
            turn = {"content": f"answer {k}", "token_len": style["token_len"]}
            rows.append(
                {
                    "question_id": f"q{k}",
                    "answer_id": f"{model}-{k}",
                    "model_id": model,
                    "choices": [{"index": 0, "turns": [turn]}],
                    "conv_metadata": style,
                }
            )
        else:
            said = {"role": "assistant", "content": {"answer": f"answer {k}"}}
            rows.append(
                {
                    "uid": f"q{k}",
                    "model": model,
                    "messages": [{"role": "user", "content": f"question {k}"}, said],
                    "metadata": style,
                }
            )
    return rows


def judgments(model, questions, old):
    """Verdicts that favour the second model, and the longer answer; a few are none."""
    rng = random.Random(f"judgments of {model}")
    own, other = (answers(name, questions, False) for name in (model, BASELINE))
    rows = []
    for k in range(questions):
        longer = own[k]["metadata"]["token_len"] - other[k]["metadata"]["token_len"]
        games = []
        for sign in (-1, 1):  # the model is B, then A
            liking = sign * (longer / 300 + 0.5 * (model == MODELS[1])) + rng.gauss(0, 1)
            label = LABELS[sum(liking < edge for edge in (1.2, 0.3, -0.3, -1.2))]
            score = None if rng.random() < 0.04 else label
            games.append({"score": score, "judgment": f"[[{label}]]"})
        if old:
            row = {"question_id": f"q{k}", "model": model, "judge": "judge", "games": games}
        else:
            row = {
                "uid": f"q{k}",
                "category": "hard_prompt",
                "judge": "judge",
                "model": model,
                "baseline": BASELINE,
                "games": games,
            }
        rows.append(row)
    return rows


def write(folder, *, old, questions=60):
    """`model_answer/MODEL.jsonl` and `model_judgment/judge/MODEL.jsonl`."""
    for kind, make, models in (
        ("model_answer", answers, (*MODELS, BASELINE)),
        ("model_judgment/judge", judgments, MODELS),
    ):
        (folder / kind).mkdir(parents=True)
        for model in models:
            lines = "".join(json.dumps(row) + "\n" for row in make(model, questions, old))
            (folder / kind / f"{model}.jsonl").write_text(lines)
