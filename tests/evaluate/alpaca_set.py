"""A small made-up set in the forms of alpaca_eval's files, the same wherever it is made."""

import csv
import json
import math
import random


def outputs(generator, rows, seed, words):
    """Outputs of a model that says about so many words; some are those of every other model."""
    rng = random.Random(f"{generator}{seed}")
    made = []
    for k in range(rows):
        count = max(1, round(rng.lognormvariate(math.log(words), 0.5)))
        text = " ".join(rng.choices(["so", "that", "é", "thus"], k=count))
        text = "The same." if k % 29 == 7 else text
        made.append(
            {
                "instruction": f"Question {k}: what is {random.Random(k).randrange(1000)}?",
                "output": text,
                "generator": generator,
                "dataset": "made-up",
            }
        )
    return made


def top_logprobs(messages):
    """What a judge says to messages: log-probs of tokens, at times without one letter or both."""
    rng = random.Random("".join(one["role"] + one["content"] for one in messages))
    first = rng.gauss(0.0, 2.0)
    p = 1 / (1 + math.exp(-first))
    top = {"m": math.log(0.98 * p), "M": math.log(0.98 * (1 - p)), " m": math.log(0.01)}
    missing = rng.random()
    if missing < 0.06:
        del top["m"]
    if missing < 0.03:
        del top["M"]
    return top


def annotations(rows=200, seed=0):
    """Preferences that lengths decide in part; a few that are none, or ties."""
    baseline, model = outputs("base", rows, seed, 40), outputs("model", rows, seed, 55)
    rng = random.Random(seed)
    made = []
    for k, (one, two) in enumerate(zip(baseline, model, strict=True)):
        longer = math.tanh((len(one["output"]) - len(two["output"])) / 150)
        z = -0.9 * longer - 0.8 * difficulty(k) - 0.2 + rng.gauss(0, 1.5)
        preference = 1 + 1 / (1 + math.exp(-z))
        if one["output"] == two["output"]:
            preference = 1.5
        made.append(
            {
                "instruction": one["instruction"],
                "output_1": one["output"],
                "generator_1": "base",
                "dataset": "made-up",
                "output_2": two["output"],
                "generator_2": "model",
                "annotator": "made-up",
                "preference": None if k % 41 == 3 else preference,
            }
        )
    return made


def difficulty(place):
    return random.Random(place).gauss(0, 1)


def write_length_data(file, rows=200):
    """`df_gamed.csv`: two models that were told to be short, or long."""
    names = ["model", "index", "preference", "std_delta_len", "instruction_difficulty"]
    with open(file, "w", newline="") as out:
        table = csv.writer(out)
        table.writerow([*names, "not_gamed_baseline"])
        for model, sign in (("concise", 1.0), ("verbose", -1.0)):
            rng = random.Random(model)
            for k in range(rows):
                delta = sign * abs(rng.gauss(1, 0.6))
                z = -1.1 * math.tanh(delta) + 0.2 * rng.gauss(0, 1)
                preference = 1 / (1 + math.exp(-z))
                table.writerow([model, k, preference, delta, difficulty(k), False])


def write(folder, rows=200):
    """All files: outputs of both models, annotations, length data."""
    for name, generator, words in (("reference", "base", 40), ("outputs", "model", 55)):
        text = json.dumps(outputs(generator, rows, 0, words))
        (folder / f"{name}.json").write_text(text)
    (folder / "annotations.json").write_text(json.dumps(annotations(rows)))
    write_length_data(folder / "df_gamed.csv", rows)
