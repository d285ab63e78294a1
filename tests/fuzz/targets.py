"""What is fuzzed: files and command lines as strangers write them, and who reads them.

An input is a mapping of file names to bytes, so that every one can be kept as a case. A target
writes it to a folder and has the package read it. Any input gives a result, or an error that tells
a user what to mend: a `UserError`, or an OSError with its file.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping

import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

from attnpo_jax import config as config_lib
from attnpo_jax.data.chat_template import Conversation
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.evaluate import alpaca_eval, arena_hard, mt_bench
from attnpo_jax.evaluate.alpaca_eval import files as alpaca_files
from attnpo_jax.evaluate.alpaca_eval import length_control
from attnpo_jax.evaluate.arena_hard import files as arena_files
from attnpo_jax.evaluate.arena_hard.settings import JudgeSettings
from attnpo_jax.evaluate.mt_bench import files as mt_files
from attnpo_jax.models.io import adapter, gguf, hf_folder
from attnpo_jax.runtime import metrics
from tests import tiny
from tests.fuzz.inputs import damaged, json_values, mutated_json, odd_texts
from tests.models.io.test_gguf import hf_weights, write_gguf

Files = Mapping[str, bytes]


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
      inputs: makes one, as a mapping of file names to bytes.
      read: has the package read the folder that holds these files.
    """

    inputs: st.SearchStrategy[Files]
    read: Callable[[pathlib.Path], object]


def _write(folder: pathlib.Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read(target: Target, files: Files) -> object:
    """Writes an input to a folder of its own, and reads it there."""
    with tempfile.TemporaryDirectory() as name:
        _write(pathlib.Path(name), files)
        return target.read(pathlib.Path(name))


@functools.cache
def made() -> pathlib.Path:
    """A folder of whole things, which inputs differ from: a model, a prepared dataset, a GGUF."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="attnpo-fuzz-"))
    tiny.write_small_inputs(folder)
    writer = PreparedWriter(folder / "train", {"source_layers": [0], "num_layers": 1}, 2, 1)
    for shard, start, stop in writer.pending():
        writer.write(shard, [_prepared_row(i) for i in range(start, stop)])
    writer.finish({})
    write_gguf(folder / "model.gguf", hf_weights(np.random.default_rng(0)))
    return folder


def clean_up() -> None:
    """Removes what the targets made for themselves."""
    if made.cache_info().currsize:
        shutil.rmtree(made())
        made.cache_clear()


def _prepared_row(i: int) -> dict[str, object]:
    ids, one = np.array([1, 2], np.int32), np.zeros(2, np.float32)
    row = {"id": str(i), "prompt_ids": ids, "judge_verdict": one}
    for side in ("chosen", "rejected"):
        row |= {f"{side}_ids": ids, f"{side}_text_length": 2, f"ref_{side}_logps": one}
        row[f"judge_{side}"] = np.zeros((2, 1, 2), np.float32)
    return row


# --- Data ---------------------------------------------------------------------------------------

_TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
_ROWS = [
    tiny.ROWS[0],
    {"chosen": _TURNS, "rejected": [_TURNS[0], {"role": "assistant", "content": "No."}]},
    {"prompt": "Add", "tools": [{"type": "function"}], "chosen": "1", "rejected": "2", "score": 3},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
]


@st.composite
def _rows(draw):
    rows = [
        draw(mutated_json(draw(st.sampled_from(_ROWS)))) for _ in range(draw(st.integers(1, 3)))
    ]
    return {"rows.jsonl": draw(damaged(b"\n".join(rows) + b"\n"))}


def _read_rows(folder):
    return list(load_pairs(str(folder / "rows.jsonl"), on_bad_row="skip").pairs)


# --- Chat templates -----------------------------------------------------------------------------

_PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{{ x.y.z }}",
    "{% if add_generation_prompt %}", "{% endif %}", "{{ messages[-9].content }}", "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}", "{{ 'a' * 9 }}", "{{ [1] | map('upper') | list }}",
    "{{ tools }}", "{{ messages | tojson }}", "{{ ''.__class__.__mro__ }}",
    "{% set a = messages + 1 %}", "{{",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{{ '%d' % 'a' }}",
    "{{ messages | sort }}", "{{ strftime_now('%Q') }}", "{% generation %}", "{{ 2 ** 90 }}",
)  # fmt: skip


def _render(folder):
    fast = tiny.byte_tokenizer(
        chat_template=(folder / "template.jinja").read_text("utf-8", "replace")
    )
    tokenizer = ChatTokenizer(fast, origin="template.jinja")
    return tokenizer.encode_conversation(Conversation(tuple(_TURNS)))


# --- Model folders ------------------------------------------------------------------------------


def _model_file(name: str) -> bytes:
    return (made() / "model" / name).read_bytes()


@st.composite
def _model_configs(draw):
    return {
        "config.json": draw(damaged(draw(mutated_json(json.loads(_model_file("config.json"))))))
    }


@st.composite
def _indices(draw):
    weights = _model_file("model.safetensors")
    names = sorted(safetensors.numpy.load(weights))
    index = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(names, "one.safetensors")}
    changed = draw(damaged(draw(mutated_json(index))))
    return {"model.safetensors.index.json": changed}


@st.composite
def _headers(draw):
    weights = _model_file("model.safetensors")
    length = int.from_bytes(weights[:8], "little")
    header = draw(mutated_json(json.loads(weights[8 : 8 + length])))
    said = draw(st.sampled_from([len(header), len(header), 0, 2**40, 2**64 - 1]))
    return {"model.safetensors": said.to_bytes(8, "little") + header + weights[8 + length :]}


def _read_weights(folder):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(made() / "model" / name, folder)
    if not (folder / "model.safetensors").exists():
        shutil.copy(made() / "model" / "model.safetensors", folder / "one.safetensors")
    model = hf_folder.load_config(folder)
    files, _ = hf_folder.weight_files(folder)
    hf_folder.stored_tensors(files)
    return hf_folder.stored_dtype(folder), model


@st.composite
def _ggufs(draw):
    return {"model.gguf": draw(damaged((made() / "model.gguf").read_bytes()))}


def _convert(folder):
    (folder / "converted").mkdir()
    gguf.convert(folder / "model.gguf", folder / "converted")


_LORA = "base_model.model.model.layers.0.mlp.down_proj.lora_"


@st.composite
def _adapters(draw):
    factors = {"A": np.ones((2, 96), np.float32), "B": np.ones((64, 2), np.float32)}
    weights = safetensors.numpy.save({f"{_LORA}{f}.weight": x for f, x in factors.items()})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3.0, "bias": "none", "alpha_pattern": {}}
    return {
        adapter.CONFIG: draw(damaged(draw(mutated_json(config)))),
        adapter.WEIGHTS: draw(st.just(weights) | damaged(weights)),
    }


# --- Run folders --------------------------------------------------------------------------------


@st.composite
def _prepared(draw):
    found = json.loads((made() / "train" / "prepared.json").read_bytes())
    return {"prepared.json": draw(damaged(draw(mutated_json(found))))}


def _open_prepared(folder):
    for file in (made() / "train").iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    dataset = Prepared.open(folder)
    return [list(dataset), dataset.lengths(), dataset.source_layers, dataset.weight_columns]


@st.composite
def _run_configs(draw):
    config = json.loads(config_lib.to_json(config_lib.default_config()))
    return {"config.json": draw(damaged(draw(mutated_json(config))))}


def _read_run_config(folder):
    config = config_lib.load_file(str(folder / "config.json"))
    config_lib.complete_sections(config)
    config_lib.validate(config)


@st.composite
def _metrics(draw):
    lines = [{"step": i, "loss": 0.5, "grad_norm": "NaN", "epoch": i / 3} for i in range(3)]
    return {metrics.FILE: draw(damaged(b"\n".join(draw(mutated_json(x)) for x in lines) + b"\n"))}


# --- Files of others' benchmarks ----------------------------------------------------------------

_GAMES = [{"score": "A>>B"}, None]
_FINDINGS = {
    "alpaca": {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1.2},
    "mt": {"question_id": 81, "model": "m", "judge": ["j", "p"], "score": 7, "turn": 1},
    "arena": {"question_id": "q", "model": "m", "games": _GAMES},
    "arena 2": {"uid": "q", "category": "c", "model": "m", "baseline": "b", "games": _GAMES},
    "settings": {"prompt_template": ["a"], "regex_patterns": ["[(A)]"], "temperature": 0},
    "lengths": dict.fromkeys(length_control.COLUMNS, 0),
}


@st.composite
def _findings(draw):
    kind = draw(st.sampled_from(list(_FINDINGS)))
    rows = [draw(mutated_json(_FINDINGS[kind])) for _ in range(draw(st.integers(1, 3)))]
    if kind == "lengths":
        rows = [",".join(length_control.COLUMNS).encode(), b"0,1,0.5,-1,False", *rows]
    content = b"[" + b",".join(rows) + b"]" if kind == "alpaca" else b"\n".join(rows)
    return {kind: draw(damaged(content))}


def _score(folder):
    (file,) = folder.iterdir()
    match file.name:
        case "alpaca":
            alpaca_eval.score(alpaca_files.read_annotations(file))
        case "mt":
            mt_bench.score(mt_files.read_judgments(file), {"81": "math"})
        case "settings":
            JudgeSettings.read(file, file).verdict("[[A>B]]")
        case "lengths":
            alpaca_eval.LengthData.read(file)
        case _:
            arena_hard.score(arena_files.read_judgments(file, ""))


# --- Command lines ------------------------------------------------------------------------------

_FIELDS = [
    *config_lib.flatten(config_lib.default_config()), "weighting", "objective", "train", "no.such",
]  # fmt: skip


@st.composite
def _overrides(draw):
    lines = []
    for _ in range(draw(st.integers(1, 2))):
        value = draw(odd_texts | json_values.map(repr) | st.integers().map(str))
        lines.append(f"--config.{draw(st.sampled_from(_FIELDS))}={value}")
    return {"overrides": "\0\n".join(lines).encode("utf-8", "surrogatepass")}


def _apply(folder):
    lines = (folder / "overrides").read_bytes().decode("utf-8", "surrogatepass").split("\0\n")
    config = config_lib.load_config(str(tiny_config()), lines)
    config_lib.validate(config)


def tiny_config() -> pathlib.Path:
    return pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"


_templates = st.lists(st.sampled_from(_PIECES) | odd_texts, max_size=6).map(
    lambda pieces: {"template.jinja": "".join(pieces).encode("utf-8", "surrogatepass")}
)

TARGETS = {
    "rows": Target(_rows(), _read_rows),
    "chat template": Target(_templates, _render),
    "model config": Target(_model_configs(), hf_folder.load_config),
    "safetensors index": Target(_indices(), _read_weights),
    "safetensors header": Target(_headers(), _read_weights),
    "gguf": Target(_ggufs(), _convert),
    "adapter": Target(_adapters(), lambda folder: adapter.load(folder, "model.adapter")),
    "prepared": Target(_prepared(), _open_prepared),
    "run config": Target(_run_configs(), _read_run_config),
    "metrics": Target(_metrics(), metrics.read),
    "benchmarks": Target(_findings(), _score),
    "overrides": Target(_overrides(), _apply),
}
