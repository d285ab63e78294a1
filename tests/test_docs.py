"""The documentation's tables and code against what they describe."""

import ast
import dataclasses
import pathlib
import re
import shlex

import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import cli, losses, registry, scorers, weighting
from attnpo_jax import config as config_lib
from attnpo_jax.config import docs as config_docs
from attnpo_jax.config.fields import FIELDS
from attnpo_jax.data import shards, sources
from attnpo_jax.data.columns import AS_THEY_ARE
from attnpo_jax.data.pair import NUMBERS, SIDES
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.probe import pairs as marked_pairs
from attnpo_jax.sweep.grid import grid

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """What these tests register is gone when they end."""
    for module in (weighting, losses, scorers):
        functions = dict(module.registry._functions)
        monkeypatch.setattr(module.registry, "_functions", functions)
    monkeypatch.setattr(registry, "_loaded_plugins", {})


def blocks(name: str, language: str) -> list[str]:
    text = (DOCS / name).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def rows(name: str, columns: int) -> list[list[str]]:
    """Cells of all tables with so many columns, headers left out."""
    lines = re.findall(r"^\| (.*) \|$", (DOCS / name).read_text(), re.M)
    tables = [line.split(" | ") for line in lines]
    return [row for row in tables if len(row) == columns and row[0].startswith("`")]


def test_config_page_is_in_step_with_the_fields():
    text = (DOCS / "config.md").read_text()
    assert config_docs.rewritten(text) == text, "run python -m attnpo_jax.config.docs"
    listed = [field.strip("`") for field, *_ in rows("config.md", 4)]
    assert listed == list(FIELDS)


def test_config_page_says_what_a_field_accepts_and_what_a_resumed_run_must_share():
    text = (DOCS / "config.md").read_text()
    stale = text.replace("a whole number from 2 to", "any").replace("`lora.alpha`, ", "")
    assert "`train.epochs` | `1` | a whole number from 1 to 100,000 | passes over the" in text
    assert stale != text == config_docs.rewritten(stale)
    sentence = re.search(r"A run resumes only with the same (.*?), and\sthe\ssame", text, re.S)[1]
    named = re.findall(r"`([\w.]+)`", sentence)
    assert {"seed", "weighting", "objective", "lora.rank", "optim", "train.steps"} <= set(named)
    for field in FIELDS:
        assert (field in named or field.split(".")[0] in named) == FIELDS[field].decisive


def test_config_page_lists_every_weighting_and_objective_with_its_hyperparameters():
    found = {name.strip("`"): hyper for name, hyper, _ in rows("config.md", 3)}
    expected = {}
    for section, functions in config_lib.SECTIONS.items():
        for name in functions.names():
            if not functions.get(name).__module__.startswith(functions.__name__):
                continue  # another test's
            hyper = functions.hyperparameters(name)
            listed = ", ".join(
                f"`{key}`" if default is registry.REQUIRED else f"`{key}={default!r}`"
                for key, default in hyper.items()
                if key not in functions.registry.options
            )
            expected[f"{section}.{name}"] = listed or "none"
    assert found == expected


def test_data_page_lists_the_prepared_columns():
    listed = [name for row in rows("data.md", 3) for name in re.findall(r"`(\w+)`", row[0])]
    every = shards.features(
        1, 1, numbers=NUMBERS, groups=shards.GROUPS, whole_responses=True, own_prompts=True
    )
    assert sorted(listed) == sorted(every)


def test_data_page_s_rows_are_all_the_same_pair(tmp_path):
    (text,) = blocks("data.md", "json")
    file = tmp_path / "pairs.jsonl"
    file.write_text(text)
    pairs = sources.load_pairs(str(file)).pairs
    assert len(pairs) == 10
    assert {(p.prompt[-1]["content"], p.chosen.strip(), p.rejected.strip()) for p in pairs} == {
        ("Name a prime.", "7", "8")
    }


def test_data_page_counts_the_builtin_pairs():
    counts = re.findall(r"`builtin:(\w+)` \((\d+)", (DOCS / "data.md").read_text())
    assert [split for split, _ in counts] == ["train", "eval", "planted"]
    for split, count in counts:
        assert len(sources.load_pairs(f"builtin:{split}").pairs) == int(count)


def test_probe_page_s_row_marks_the_words_that_differ(tmp_path):
    (text,) = blocks("probe.md", "json")
    file = tmp_path / "marked.jsonl"
    file.write_text(text)
    (found,) = marked_pairs.load(str(file), AS_THEY_ARE, on_bad_row="error", limit=1 << 20).pairs
    words = [getattr(found.pair, side)[slice(*found.spans[side][0])] for side in SIDES]
    assert words == ["eight", "six"]


def test_data_page_reads_a_prepared_dataset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = pathlib.Path("runs/quickstart/prepared/eval")
    writer = PreparedWriter(folder, {"source_layers": [3], "num_layers": 4}, 2, 2)
    attention = np.full((2, 1, 1), 0.5, np.float32)
    row = {
        "prompt_ids": np.array([1], np.int32),
        "chosen_ids": np.array([2, 3], np.int32),
        "rejected_ids": np.array([4], np.int32),
        "chosen_text_length": 1,
        "rejected_text_length": 1,
        "judge_chosen": attention,
        "judge_rejected": attention,
        "ref_chosen_logps": np.array([-1, -1], np.float32),
        "ref_rejected_logps": np.array([-1], np.float32),
    }
    verdicts = {"a": [0.5, 0.25], "b": [1.0, -1.0]}
    writer.write(
        0,
        [row | {"id": i, "judge_verdict": np.array(v, np.float32)} for i, v in verdicts.items()],
    )
    writer.finish({})
    (code,) = (block for block in blocks("data.md", "python") if "Prepared.open" in block)
    exec(compile(code, "data.md", "exec"), {})
    assert "1 of 2 pairs judged as labelled in both orders, layers (3,)" in capsys.readouterr().out


def test_data_page_s_scorers_are_accepted_and_its_function_scores(tmp_path):
    config, function = (b for b in blocks("data.md", "python") if "scorers" in b)
    (tmp_path / "tis.py").write_text(config)
    found = config_lib.load_config(str(tmp_path / "tis.py"))
    config_lib.validate(found)
    assert [one.name for one in config_lib.scorers(found)] == ["away", "towards"]
    assert {found.weighting.column, found.weighting.against} == {"away", "towards"}
    (tmp_path / "repeats.py").write_text(function)
    found.plugins = (str(tmp_path / "repeats.py"),)
    found.prepare.scorers |= {"again": {"function": "repeats", "window": 2}}
    config_lib.validate(found)
    again = next(one for one in config_lib.scorers(found) if one.name == "again")
    assert again.function(np.array([5, 6, 5, 7, 6]), np.array([1])).tolist() == [0, 0, 1, 0, 0]
    (command,) = (b for b in blocks("data.md", "bash") if "critical" in b)
    overrides = [text for text in shlex.split(command) if text.startswith("--config.")]
    found = config_lib.load_config("configs/quickstart.py", overrides)
    config_lib.validate(found)
    assert [one.name for one in config_lib.scorers(found)] == ["bad", "good"]
    assert (found.weighting.column, found.weighting.against) == ("good", "bad")


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """The research page's functions as plugin files, by name."""
    folder = tmp_path_factory.mktemp("plugins")
    for code in blocks("research.md", "python"):
        (function,) = (n for n in ast.parse(code).body if isinstance(n, ast.FunctionDef))
        (folder / f"{function.name}.py").write_text(code)
    return folder


def test_research_page_s_command_resolves(plugins, monkeypatch):
    (command,) = blocks("research.md", "bash")
    options, overrides = cli.parse("sweep", shlex.split(command)[2:])
    monkeypatch.chdir(plugins)
    (plugins / "configs").symlink_to(ROOT / "configs")
    base = config_lib.load_config(options["config"], overrides)
    points = {point.name: point for point in grid(base, options["set"], options["variant"])}
    assert len(points) == 9 and points["hot,seed=1"].config.weighting.temperature == 2.0
    config = config_lib.load_config(
        "configs/quickstart.py", [*overrides, "--config.weighting.name=surprise"]
    )
    weigh = config_lib.bind_section(weighting, config.weighting)
    mask = jnp.array([[True, True, False], [False, False, False]])
    logps = jnp.log(jnp.array([[0.5, 0.25, 1.0], [1.0, 1.0, 1.0]]))
    response = weighting.ResponseTokens(
        mask_BT=mask,
        text_mask_BT=mask,
        judge_B2ST=jnp.zeros((2, 2, 1, 3)),
        verdict_B2=jnp.zeros((2, 2)),
        reference_logps_BT=logps,
        policy_logps_BT=logps,
        is_chosen=jnp.array([True, False]),
    )
    # Scores 2 and 4, scaled to a sum of 2 tokens; a padding row has none.
    weights = weigh(response).tolist()
    assert weights[0] == pytest.approx([2 / 3, 4 / 3, 0.0]) and weights[1] == [0.0, 0.0, 0.0]


def test_research_page_s_weightings_of_entropy_and_of_the_other_response(plugins):
    config = config_lib.default_config()
    config.plugins = (str(plugins / "undecided.py"), str(plugins / "own_words.py"))
    mask = [[True, True, True], [False] * 3]
    response = weighting.ResponseTokens.of(
        mask,
        policy_entropy_BT=[[2.0, 0.5, 1.5], [0.0] * 3],
        tokens_BT=[[7, 8, 9], [-1] * 3],
        partner_tokens_BT=[[9, 5, -1], [-1] * 3],
    )
    for name, needs, expected in (
        ("undecided", ("policy_entropy",), [1.0, 0.0, 1.0]),
        ("own_words", (), [1.0, 1.0, 0.2]),
    ):
        config = config_lib.complete_sections(config, weighting=name)
        config_lib.validate(config)
        settings = config_lib.step_settings(config, None, (), "xla")
        assert settings.needs == needs
        weights = settings.weighting(response).tolist()
        assert weights[0] == pytest.approx(expected) and weights[1] == [0.0] * 3
        # Ten lines, without those that are empty or that import.
        (code,) = (b for b in blocks("research.md", "python") if f"def {name}" in b)
        assert sum(bool(line) and "import" not in line for line in code.splitlines()) <= 10


def test_research_page_s_objective(plugins):
    config = config_lib.default_config()
    config.plugins = (str(plugins / "exponential.py"),)
    config = config_lib.complete_sections(config, objective="exponential")
    config_lib.validate(config)

    def scores(log_ratio):
        one = jnp.ones(1)
        return losses.ResponseScores(
            policy_B=log_ratio * one, reference_B=0 * one, weight_B=one, length_B=one
        )

    loss = config_lib.bind_section(losses, config.objective)
    assert loss(scores(5.0), scores(-5.0)).tolist() == pytest.approx([0.36788], abs=1e-5)  # 1/e


def test_research_page_s_objective_with_a_margin(plugins):
    config = config_lib.default_config()
    config.plugins = (str(plugins / "offset_hinge.py"),)
    config.data.fields.margin = "gap"
    config = config_lib.complete_sections(config, objective="offset_hinge")
    config_lib.validate(config)
    one = jnp.ones(1)
    of = {"policy_B": 5 * one, "reference_B": 0 * one, "weight_B": one, "length_B": one}
    loss = config_lib.bind_section(losses, config.objective)
    zero = losses.ResponseScores(**of | {"policy_B": 0 * one})
    for margin, found in ((None, 0.5), (3 * one, 2.5), (0.25 * one, 0.0)):
        chosen = losses.ResponseScores(**of, margin_B=margin)
        assert loss(chosen, zero).tolist() == pytest.approx([found])


def test_research_page_lists_what_a_weighting_may_use():
    listed = [name for row in rows("research.md", 3) for name in re.findall(r"`(\w+)`", row[0])]
    assert listed == [field.name for field in dataclasses.fields(weighting.ResponseTokens)]


def test_launching_page_names_scripts_and_parameters_that_exist():
    text = (DOCS / "launching.md").read_text()
    scripts = {
        path: (DOCS.parent / path).read_text() for path in re.findall(r"launch/\w+\.\w+", text)
    }
    assert len(scripts) == 7
    parameters = "\n".join(scripts.values())
    for name in re.findall(r"(?<![\w$])([A-Z]{3,})=", text.replace("ATTNPO_DISTRIBUTED=", "")):
        assert re.search(rf"^ *{name}(=|:)", parameters, re.MULTILINE), name
    for command in re.findall(r"^launch/tpu_pod.sh (\w+)$", text, re.MULTILINE):
        assert re.search(rf"^{command}\)", scripts["launch/tpu_pod.sh"], re.MULTILINE), command


def anchors(text: str) -> set[str]:
    """What a link to a place on a page may name: its headings, and the places it marks itself."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    found = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
    return found | set(re.findall(r'<a id="([^"]+)"', text))


def test_links_lead_to_places_that_exist():
    pages = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "SECURITY.md"]
    texts = {page: page.read_text() for page in pages}
    followed = 0
    for page, text in texts.items():
        for path, place in re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", text):
            target = (page.parent / path).resolve() if path else page
            assert place in anchors(texts[target]), f"{page.name}: {path}#{place}"
            followed += 1
    assert followed > 50


def test_index_lists_every_page():
    linked = re.findall(r"\]\((\w+\.md)\)", (DOCS / "README.md").read_text())
    assert sorted([*linked, "README.md"]) == sorted(path.name for path in DOCS.glob("*.md"))


def test_development_page_names_files_that_exist():
    (layout,) = blocks("development.md", "text")
    for word in re.findall(r"[\w/]+(?:\.py|/)", layout):
        assert (ROOT / word).exists() or (ROOT / "attnpo_jax" / word).exists(), word
    for file in re.findall(r"`(attnpo_jax/[\w/]+\.py)`", (DOCS / "development.md").read_text()):
        assert (ROOT / file).exists(), file
