"""What the package alpaca_eval itself makes of files; run by a Python that has it.

    python tests/evaluate/alpaca_package.py FOLDER

FOLDER has `df_gamed.csv`, `annotations.json` and `instructions.json`, a list of texts; with
`reference.json`, `outputs.json` and `prompt.txt`, the package annotates those too, at the endpoint
that `OPENAI_API_BASE` names. Prints one JSON object.
"""

import json
import os
import pathlib
import sys

FOLDER = pathlib.Path(sys.argv[1]).resolve()
os.environ.setdefault("OPENAI_API_KEY", "none")

import pandas as pd  # noqa: E402
from alpaca_eval import annotators, metrics, processors  # noqa: E402
from alpaca_eval.metrics import glm_winrate  # noqa: E402

CONFIG = {
    "weighted": {
        "prompt_template": str(FOLDER / "prompt.txt"),
        "fn_completions": "openai_completions",
        "completions_kwargs": {
            "model_name": "judge",
            "max_tokens": 1,
            "temperature": 1,
            "logprobs": True,
            "top_logprobs": 5,
        },
        "fn_completion_parser": "logprob_parser",
        "completion_parser_kwargs": {
            "numerator_token": "m",
            "denominator_tokens": ["m", "M"],
            "is_binarize": False,
        },
        "completion_key": "completions_all",
        "batch_size": 1,
    }
}


def figures(file):
    """Win rates of annotations, in percent."""
    found = metrics.get_length_controlled_winrate(
        pd.read_json(file), save_weights_dir=None, is_warn_extreme_changes=False
    )
    return {key: float(value) for key, value in found.items()}


def swaps(instructions):
    """Whether the package shows the outputs in the other order."""
    processor = processors.RandomSwitchTwoColumnsProcessor(
        two_columns_to_switch=["output_1", "output_2"],
        random_seed_columns=["instruction"],
        _switch_column="is_switched_outputs",
        seed=0,
    )
    rows = pd.DataFrame({"instruction": instructions})
    rows = rows.assign(output_1="a", output_2="b")
    return [bool(one) for one in processor.preprocess(rows)["is_switched_outputs"]]


def annotated():
    """The package's own annotations of the outputs."""
    config = FOLDER / "weighted" / "configs.yaml"
    config.parent.mkdir(exist_ok=True)
    config.write_text(json.dumps(CONFIG))  # JSON is YAML
    annotator = annotators.PairwiseAnnotator(
        annotators_config=str(config), caching_path=None, is_avoid_reannotations=False
    )
    rows = annotator.annotate_head2head(
        outputs_1=pd.read_json(FOLDER / "reference.json"),
        outputs_2=pd.read_json(FOLDER / "outputs.json"),
    )
    keys = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "annotator")
    keep = pd.DataFrame(rows)[[*keys, "preference"]]
    keep.to_json(FOLDER / "package_annotations.json", orient="records", indent=2)
    return figures(FOLDER / "package_annotations.json")


glm_winrate.hf_hub_download = lambda **_: str(FOLDER / "df_gamed.csv")
found = {"figures": figures(FOLDER / "annotations.json")}
if (FOLDER / "instructions.json").exists():
    found["swaps"] = swaps(json.loads((FOLDER / "instructions.json").read_text()))
if (FOLDER / "prompt.txt").exists():
    found["annotated"] = annotated()
print(json.dumps(found))
