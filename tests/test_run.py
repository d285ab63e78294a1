import collections
import inspect
import io
import re
import shutil

import pytest
from rich.console import Console

from attnpo_jax import cli, export, iterate, prepare, probe, report, train
from attnpo_jax import config as config_lib
from attnpo_jax import run as run_lib
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.evaluate import stage as evaluate
from attnpo_jax.export import weights as export_weights
from attnpo_jax.generate import stage as generate
from attnpo_jax.judge.prompt import JudgeTemplate
from attnpo_jax.models.io import hf_folder
from attnpo_jax.parallel.checkpoint_damage import CheckpointMismatch
from attnpo_jax.run import Run
from attnpo_jax.runtime import lock
from attnpo_jax.runtime.errors import UserError
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


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A config of one step, and the workdir of a finished run."""
    folder = tmp_path_factory.mktemp("done")
    tiny.write_small_inputs(folder)
    config = tiny.small_config(folder, data__eval="", train__steps=1)
    run_lib.run(Run.resolve(config, folder / "work"), console=Console(quiet=True))
    return config, folder / "work"


def contents(workdir):
    """All files below, by name; with their times, so that one written anew counts as another."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in workdir.rglob("*")
        if path.is_file() and path.name != lock.FILE
    }


def answers(run, console):
    generate.generate(run, prompts="builtin:eval", console=console)


def checks(run, console):
    evaluate.evaluate(run, name="checks", model="base", console=console)


STAGES = (
    prepare.prepare,
    train.train,
    export.export,
    export_weights.export_weights,
    run_lib.run,
    answers,
    checks,
    probe.probe,
    iterate.iterate,
    report.report,
)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_second_run_at_the_same_time_is_refused_by_every_stage(done, stage):
    config, workdir = done
    before = contents(workdir)
    with Run.resolve(config, workdir).writing():
        other = config.copy_and_resolve_references()
        other.optim.learning_rate = 0.5
        other.iterate.prompts, other.iterate.labeler = "builtin:checks-train", "verifier"
        with pytest.raises(lock.LockedError, match=f"{workdir} is being written by"):
            stage(Run.resolve(other, workdir), console=Console(quiet=True))
    assert contents(workdir) == before
    assert not (workdir / lock.FILE).exists()


def test_a_folder_of_checkpoints_elsewhere_is_one_run_s_too(done, tmp_path):
    config, _ = done
    config = config.copy_and_resolve_references()
    config.train.checkpoint_dir = str(tmp_path / "checkpoints")
    with Run.resolve(config, tmp_path / "one").writing():
        with pytest.raises(lock.LockedError, match="checkpoints is being written by"):
            train.train(Run.resolve(config, tmp_path / "other"))
    assert list(tmp_path.iterdir()) == []


def test_a_prepared_folder_that_workdirs_share_is_prepared_by_one_at_a_time(done, tmp_path):
    config, workdir = done
    (tmp_path / "shared").mkdir()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prepared").symlink_to(tmp_path / "shared")
    one, other = (Run.resolve(config, tmp_path / name) for name in ("one", "other"))
    with one.preparing():
        with pytest.raises(lock.LockedError, match=f"{tmp_path}/shared is being written by"):
            prepare.prepare(other, console=Console(quiet=True))
    shutil.copytree(workdir / "prepared", tmp_path / "shared", dirs_exist_ok=True)
    with one.preparing():  # what is complete, all may use
        prepare.prepare(other, console=Console(quiet=True))


@pytest.mark.parametrize("stage", [train.train, run_lib.run], ids=["train", "run"])
def test_a_changed_decisive_field_is_refused_before_anything_is_written(done, stage):
    config, workdir = done
    before = contents(workdir)
    other = config.copy_and_resolve_references()
    other.optim.learning_rate, other.data.max_length = 0.5, 150
    with pytest.raises(CheckpointMismatch) as found:
        stage(Run.resolve(other, workdir), console=Console(quiet=True))
    assert "config.optim.learning_rate: 1e-06 in the checkpoint, 0.5 here" in str(found.value)
    assert contents(workdir) == before


def test_another_checkpoint_than_the_usual_one_may_be_asked_for(done):
    config, workdir = done
    run_lib.run(Run.resolve(config, workdir), step="newest", console=Console(quiet=True))
    with pytest.raises(UserError, match="no checkpoint '7': .* has those of 1; accepted"):
        run_lib.run(Run.resolve(config, workdir), step="7", console=Console(quiet=True))


def test_links_to_folders_elsewhere_are_those_folders(done, tmp_path):
    """The workdir, and in it `prepared`, `checkpoints` and `export`; written twice."""
    config, workdir = done
    config = config.copy_and_resolve_references()
    (tmp_path / "work").symlink_to(tmp_path / "disk" / "work")
    (tmp_path / "disk" / "work").mkdir(parents=True)
    for name in ("prepared", "checkpoints", "export"):
        (tmp_path / "disk" / "work" / name).symlink_to(tmp_path / "disk" / name)
    for number in range(2):
        run_lib.run(Run.resolve(config, tmp_path / "work"), console=Console(quiet=True))
        for name in ("prepared", "checkpoints", "export"):
            assert (tmp_path / "disk" / "work" / name).is_symlink()
            assert any((tmp_path / "disk" / name).iterdir())
        ours, theirs = (w / "export" / "model.safetensors" for w in (tmp_path / "work", workdir))
        assert ours.read_bytes() == theirs.read_bytes()
        if number == 0:  # an export that is another one's is replaced
            (tmp_path / "disk" / "export" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "disk").glob(".*")] == []


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
