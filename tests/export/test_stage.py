import json
import shutil

import jax
import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.export.stage import export
from attnpo_jax.generate import model as models_to_sample
from attnpo_jax.models import decoder
from attnpo_jax.models.io import hf_folder as models
from attnpo_jax.parallel.checkpoint import CheckpointMismatch, Checkpoints
from attnpo_jax.parallel.state import TrainState, create
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.metrics import MetricsWriter
from attnpo_jax.train import optim
from tests import tiny

SHAPE = tiny.HF_CONFIG | {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def write_model(folder, **changes):
    source = folder / "source"
    source.mkdir(parents=True)
    (source / "tokenizer_config.json").write_text('{"chat_template": "hello"}')
    return tiny.write_model(folder, SHAPE | changes)


def make_config(model_folder, param_dtype="float32"):
    config = config_lib.default_config()
    config.model.source = str(model_folder)
    config.model.param_dtype = param_dtype
    return config


def save_checkpoint(workdir, config, step, seed=None):
    """A checkpoint of random parameters that differ by step; returns them."""
    model = models.load_config(config.model.source)
    params = decoder.init_params(model, jax.random.key(seed or step), config.model.param_dtype)
    state = create(params, optim.make_optimizer(config.optim, lambda step: 0.0))
    with Checkpoints(workdir / "checkpoints", {}, keep=5) as checkpoints:
        checkpoints.save(TrainState(jax.numpy.int32(step), params, state.opt_state))
    return params


def exported_params(folder, dtype="float32"):
    return models.load_params(folder, models.load_config(folder), param_dtype=dtype)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_exports_the_newest_checkpoint_with_the_companions_of_the_source(tmp_path, capsys):
    config = make_config(write_model(tmp_path))
    workdir = tmp_path / "w[/red]x"  # no markup, where it is printed
    save_checkpoint(workdir, config, 3)
    newest = save_checkpoint(workdir, config, 12)
    folder = export(Run.resolve(config, workdir))
    assert folder == workdir / "export"
    assert f"{folder}: the model of step 12" in capsys.readouterr().out
    assert_same(exported_params(folder), newest)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"chat_template": "hello"}


def test_exports_the_best_checkpoint_or_that_which_is_asked_for(tmp_path, capsys, caplog):
    config = make_config(write_model(tmp_path))
    config.train.keep_best, config.train.eval_every = "min:eval_loss", 1
    first, _ = (save_checkpoint(tmp_path, config, step) for step in (3, 12))
    with MetricsWriter(tmp_path, 0) as metrics:
        for step, loss in ((0, 0.1), (3, 0.5), (12, 0.6)):
            metrics.write(step, {"eval_loss": loss})
    run = Run.resolve(config, tmp_path)
    with caplog.at_level("INFO", "attnpo_jax"):
        folder = export(run)
    assert_same(exported_params(folder), first)
    assert "the trained model is that of step 3, the best by min:eval_loss" in caplog.messages
    export(run, step="best")
    export(run, step="newest")
    assert "step 12 for transformers" in capsys.readouterr().out
    export(run, step=3)
    export(run, step=3)
    export(run, step="12")
    out = capsys.readouterr().out
    assert ["step 3 for transformers (" in out, "step 3 for transformers, as it was" in out] == [
        True, True,
    ]  # fmt: skip
    assert "the model of step 12" in out
    with pytest.raises(UserError, match="no checkpoint '4'.* has those of 3, 12"):
        export(run, step="4")
    # The same of a model that is sampled from.
    named = ("trained", "trained@best", "trained@newest")
    assert [models_to_sample.step_of(run, name) for name in named] == [3, 3, None]
    assert [models_to_sample.is_trained(text) for text in ("trained", "trained@12", "base")] == [
        True, True, False,
    ]  # fmt: skip


def test_transformers_gives_the_logits_of_the_checkpoint(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = make_config(write_model(tmp_path))
    params = save_checkpoint(tmp_path / "run", config, 1)
    tokens = np.arange(10)[None] % 32
    hidden = decoder.forward(
        models.load_config(config.model.source),
        params,
        tokens,
        np.arange(10)[None],
        np.ones((1, 10), np.int32),
    )
    ours = hidden @ decoder.unembedding(params).T
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        export(Run.resolve(config, tmp_path / "run"))
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_another_export_replaces_the_first(tmp_path):
    config = make_config(write_model(tmp_path))
    save_checkpoint(tmp_path / "run", config, 1)
    export(Run.resolve(config, tmp_path / "run"), tmp_path / "out")
    newest = save_checkpoint(tmp_path / "run", config, 2)
    assert export(Run.resolve(config, tmp_path / "run"), tmp_path / "out") == tmp_path / "out"
    assert_same(exported_params(tmp_path / "out"), newest)


def test_what_is_exported_already_is_not_written_again(tmp_path):
    config = make_config(write_model(tmp_path))
    save_checkpoint(tmp_path / "run", config, 1)
    weights = export(Run.resolve(config, tmp_path / "run")) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    # What is left by an export that was killed while it removed the one before.
    left = tmp_path / "run" / f".export.{'0' * 32}.old"
    left.mkdir()
    export(Run.resolve(config, tmp_path / "run"))
    assert weights.stat().st_mtime_ns == before and not left.exists()
    # With another chat template it is something else.
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    config.model.chat_template = str(template)
    folder = export(Run.resolve(config, tmp_path / "run"))
    assert (folder / "chat_template.jinja").read_text() == template.read_text()
    # So it is with another tokenizer beside the model that it comes from.
    source = tmp_path / "model" / "tokenizer_config.json"
    source.write_text('{"chat_template": "hello", "eos_token": "</s>"}')
    export(Run.resolve(config, tmp_path / "run"))
    assert "</s>" in (folder / "tokenizer_config.json").read_text()
    before = weights.stat().st_mtime_ns
    # The same step of another run is something else; so is an export without its weights.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    save_checkpoint(tmp_path / "run", config, 1, seed=2)
    export(Run.resolve(config, tmp_path / "run"))
    replaced = weights.stat().st_mtime_ns
    assert replaced != before
    with open(weights, "r+b") as file:
        file.truncate(100)
    export(Run.resolve(config, tmp_path / "run"))
    assert weights.stat().st_size > 100
    weights.unlink()
    export(Run.resolve(config, tmp_path / "run"))
    assert weights.is_file()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b"[]", b'{"files": {"a": -1}}'])
def test_an_export_with_a_damaged_note_of_what_it_is_is_written_again(tmp_path, caplog, content):
    config = make_config(write_model(tmp_path))
    save_checkpoint(tmp_path / "run", config, 1)
    note = export(Run.resolve(config, tmp_path / "run")) / "attnpo_export.json"
    before = note.read_bytes()
    note.write_bytes(content)
    export(Run.resolve(config, tmp_path / "run"))
    assert note.read_bytes() == before
    assert f"{note}: damaged" in caplog.text and "it is exported again" in caplog.text


def test_checkpoints_elsewhere(tmp_path):
    config = make_config(write_model(tmp_path))
    config.train.checkpoint_dir = str(tmp_path / "elsewhere")
    newest = save_checkpoint(tmp_path / "run", config, 3)
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    assert_same(exported_params(export(Run.resolve(config, tmp_path / "run"))), newest)


def test_bfloat16_parameters_stay_bfloat16(tmp_path):
    config = make_config(write_model(tmp_path), "bfloat16")
    params = save_checkpoint(tmp_path / "run", config, 1)
    folder = export(Run.resolve(config, tmp_path / "run"))
    written = json.loads((folder / "config.json").read_text())
    assert "bfloat16" in (written.get("dtype"), written.get("torch_dtype"))
    assert_same(exported_params(folder, "bfloat16"), params)


def test_nothing_to_export(tmp_path):
    config = make_config(write_model(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"run/checkpoints holds no checkpoint"):
        export(Run.resolve(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_model_is_refused(tmp_path):
    config = make_config(write_model(tmp_path))
    save_checkpoint(tmp_path / "run", config, 1)
    config.model.source = str(write_model(tmp_path / "wider", intermediate_size=20))
    with pytest.raises(CheckpointMismatch, match=r"params.layers.down: float32\[2,12,8\]"):
        export(Run.resolve(config, tmp_path / "run"))
    assert not (tmp_path / "run" / "export").exists()


def test_a_chat_template_of_the_config_s_takes_the_place_of_the_tokenizer_s(tmp_path):
    folder = write_model(tmp_path)
    tokenizer = {"chat_template": "of the tokenizer", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text("of the tokenizer")
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }} «own»")
    config = make_config(folder)
    save_checkpoint(tmp_path / "run", config, 1)
    config.model.chat_template = str(tmp_path / "own.jinja")
    out = export(Run.resolve(config, tmp_path / "run"))
    own = "{{ messages[0]['content'] }} «own»"
    assert (out / "chat_template.jinja").read_text() == own
    expected = {"chat_template": own, "model_max_length": 64}
    assert json.loads((out / "tokenizer_config.json").read_text()) == expected
    # The source's files are as they were.
    assert json.loads((folder / "tokenizer_config.json").read_text()) == tokenizer


def test_transformers_renders_with_the_exported_template(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tiny.write_folder(tmp_path)
    config = make_config(folder)
    save_checkpoint(tmp_path / "run", config, 1)
    messages = [{"role": "user", "content": "hi"}]
    load = transformers.AutoTokenizer.from_pretrained

    def rendered(name):
        exported = load(export(Run.resolve(config, tmp_path / "run"), tmp_path / name))
        return exported.apply_chat_template(messages, tokenize=False)

    assert rendered("plain") == "<|im_start|>user\nhi<|im_end|>\n"
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    config.model.chat_template = str(tmp_path / "own.jinja")
    assert rendered("own") == "<hi>"
