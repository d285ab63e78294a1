import collections
import inspect
import io
import re

import pytest
from rich.console import Console

from attnpo_jax import cli
from attnpo_jax import config as config_lib
from attnpo_jax import run as run_lib
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge.prompt import JudgeTemplate
from attnpo_jax.models.io import hf_folder
from attnpo_jax.run import Run
from tests import tiny


def test_what_is_done_is_not_done_again_and_said_to_be(tmp_path, caplog):
    caplog.set_level("INFO", "attnpo_jax")
    tiny.write_small_inputs(tmp_path)
    config = tiny.small_config(tmp_path, train__batch_size=4, train__microbatch_size=2)
    workdir, said = tmp_path / "work", []
    for _ in range(2):
        text = io.StringIO()
        run_lib.run(Run.resolve(config, workdir), console=Console(file=text, width=100))
        said.append(text.getvalue())
    first, second = said
    for text in said:
        assert text.count("held-out pairs, before training and after 2 steps") == 1
        for name in ("export", "metrics.jsonl", "checkpoints", "prepared", "config.json"):
            assert str(workdir / name) in text
    begins = f"{workdir}/export: the model of step 2 for transformers"
    assert re.search(rf"^{begins} \(\d files, 0.1 MB\)$", first, re.MULTILINE), first
    assert re.search(rf"^{begins}, as it was before \(\d files", second, re.MULTILINE), second
    assert "complete, used as it is" in second
    assert f"all 2 steps are done, and saved in {workdir}/checkpoints" in caplog.messages


def test_without_held_out_pairs_there_is_no_table(tmp_path):
    tiny.write_small_inputs(tmp_path)
    config = tiny.small_config(tmp_path, data__eval="", train__steps=1)
    text = io.StringIO()
    run_lib.run(Run.resolve(config, tmp_path / "work"), console=Console(file=text, width=100))
    assert "held-out" not in text.getvalue() and "/work/export" in text.getvalue()


@pytest.mark.process
def test_everything_is_resolved_once(tmp_path, monkeypatch):
    tiny.write_small_inputs(tmp_path)
    config = tiny.small_config(tmp_path, train__batch_size=4, train__microbatch_size=2)
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    (tmp_path / "config.py").write_text(
        "import pathlib\nfrom attnpo_jax import config\n"
        "def get_config():\n"
        "    file = pathlib.Path(__file__).with_suffix('.json')\n"
        "    return config.from_json(file.read_text())\n"
    )
    counts = collections.Counter()

    def count(owner, name):
        original = inspect.getattr_static(owner, name)
        function = getattr(original, "__func__", original)

        def counted(*args, **kwargs):
            counts[name if owner not in (ChatTokenizer, JudgeTemplate) else owner.__name__] += 1
            return function(*args, **kwargs)

        kind = type(original) if isinstance(original, classmethod) else lambda f: f
        monkeypatch.setattr(owner, name, kind(counted))

    for name in ("resolve", "load_config", "weights_digest", "load_params"):
        count(hf_folder, name)
    count(ChatTokenizer, "load")
    count(JudgeTemplate, "load")
    count(config_lib, "validate")
    arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'work'}"]
    assert cli.main(["run", *arguments]) == 0
    names = ("resolve", "load_config", "weights_digest", "load_params", "validate")
    assert counts == dict.fromkeys((*names, "ChatTokenizer", "JudgeTemplate"), 1)
    assert (tmp_path / "work" / "export" / "model.safetensors").exists()
