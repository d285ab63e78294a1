"""The page of a real run of a tiny model, with hostile texts wherever texts of others go."""

import base64
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest
from rich.console import Console

import attnpo_jax
from attnpo_jax import config as config_lib
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.report import at_end, codes, page, report, stage
from attnpo_jax.run import Run
from attnpo_jax.runtime import metrics
from attnpo_jax.runtime.errors import UsageError, UserError
from attnpo_jax.runtime.printable import printable
from tests.report.conftest import QUIET, STEPS
from tests.report.hostile import STRINGS
from tests.report.test_parts import decoded

pytestmark = pytest.mark.process

# What a page has of its own, and no text may add to.
TAGS = (
    "a body br button caption details div em fieldset footer form h1 h2 head header html img input "
    "label legend li link main meta nav noscript p script section select span style summary table "
    "tbody td th thead title tr ul"
).split()


class Parsed(html.parser.HTMLParser):
    """A page's elements, texts, scripts and styles, as a browser would see them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts, self.raw = [], [], [], {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            kind = self.elements[-1][1].get("type", self.open[-1])
            self.raw[kind] = self.raw.get(kind, "") + data
        else:
            self.texts.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data!r}")

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def digest(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_no_text_becomes_anything_else(which, request):
    parsed = Parsed(request.getfixturevalue(which))
    assert parsed.open == []
    names = [tag for tag, _ in parsed.elements]
    assert {*names} <= {*TAGS}
    for tag in ("html", "head", "body", "title", "h1", "main", "nav", "style", "form", "link"):
        assert names.count(tag) == 1, tag
    assert names.count("script") == 2 and {*parsed.raw} == {"style", "script", "application/json"}
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href"):
            address = attributes.get(name)
            assert address is None or address.startswith(
                ("#", "data:image/svg+xml;base64,", "data:,")
            )
    assert not [tag for tag, one in parsed.elements if {"srcdoc", "action", "srcset"} & {*one}]


def test_the_policy_lets_the_page_s_own_style_and_script_through_and_nothing_else(plain):
    parsed = Parsed(plain)
    (policy,) = (m["content"] for m in parsed.all("meta") if "http-equiv" in m)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "script-src": digest(parsed.raw["script"]),
        "style-src": digest(parsed.raw["style"]),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
    }
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "fetch(",
    ):
        assert word not in parsed.raw["script"]


def test_hostile_texts_are_there_as_texts(hostile):
    parsed = Parsed(hostile)
    text = "".join(parsed.texts)
    data = json.loads(parsed.raw["application/json"])
    told = [pair["id"] for pair in data["pairs"]]
    for k, string in enumerate(STRINGS):
        safe = printable(string)
        assert f"{k} {safe}" in told
        assert safe in text  # the name of a stage
    # Metrics, in the words of their figures or listed.
    alts = "".join(image["alt"] for image in parsed.all("img"))
    listed = text[text.index("Not drawn, since there are so many") :]
    assert all(
        f"{printable(name)} by step: " in alts or printable(name) in listed for name in STRINGS
    )
    responses = [
        "".join(data["vocabulary"][k] for k in places(r["tokens"]))
        for p in data["pairs"]
        for r in p["responses"]
    ]
    assert any("<script>alert(1)</script> yes<|im_end|>" in response for response in responses)


def places(text):
    digits = [codes.ALPHABET.index(c) for c in text]
    return [
        (a * 64 + b) * 64 + c for a, b, c in zip(*(digits[k::3] for k in range(3)), strict=True)
    ]


def test_it_can_be_read_without_seeing_it(plain):
    parsed = Parsed(plain)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len({*ids})
    for attributes in parsed.all("img"):
        assert len(attributes["alt"]) > 10
    for attributes in parsed.all("th"):
        assert attributes["scope"] in ("col", "row")
    tables, captions = len(parsed.all("table")), len(parsed.all("caption"))
    assert tables == captions > 3
    for section in parsed.all("section"):
        assert section["aria-labelledby"] in ids
    linked = [a["href"].removeprefix("#") for a in parsed.all("a")]
    assert {*linked} <= {*ids} and "main" in linked and parsed.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    # Each control is inside of its label.
    assert len(parsed.all("label")) == len(parsed.all("select")) + len(parsed.all("input"))


def data_of(text):
    return json.loads(Parsed(text).raw["application/json"])


def attention(judge_2ST, tokens):
    """The last layer's weights: shares by order, their mean, the sink fix, times the tokens."""
    last = judge_2ST[:, -1].astype(np.float64)
    share = (last / last.sum(axis=1, keepdims=True)).mean(axis=0)
    n = len(share)
    if n >= 5:
        share = np.array([1 / n, *(share[1:] / share[1:].sum() * (1 - 1 / n))])
    return [*(n * share), *[0.0] * (tokens - n)]


def test_weights_and_log_ratios_are_those_of_the_run(run, plain):
    data = data_of(plain)
    keys = [view["key"] for view in data["views"]]
    assert keys[0] == "trained" and {"uniform", "diff", "confpo", "policy_entropy"} <= {*keys}
    missing = {view["key"]: view["missing"] for view in data["views"] if view["missing"]}
    # What needs a column of precomputed weights, or of the reference; the data have none.
    assert {"column", "critical_tokens", "sepo", "tgdpo", "tis_dpo"} < {*missing}
    assert "reference_entropy_BT is not computed here" in missing["reference_entropy"]
    assert "needs a value for 'column'" in missing["sepo"]
    dataset = Prepared.open(run.prepared_path("eval"))
    held_out = [pair for pair in data["pairs"] if pair["split"] == "held-out"]
    margins = []
    for pair, row in zip(held_out, dataset, strict=True):
        margin = 0.0
        for sign, side, response in zip(
            (1, -1), ("chosen", "rejected"), pair["responses"], strict=True
        ):
            n, text = response["n"], row[f"{side}_text_length"]
            assert (n, response["text"]) == (len(row[f"{side}_ids"]), text)
            weights = decoded(response["views"][0], n)
            assert weights == pytest.approx(attention(row[f"judge_{side}"], n), rel=0.004)
            assert decoded(response["views"][keys.index("uniform")], n) == [1.0] * n
            margin += sign * sum(decoded(response["ratio"], n))
            assert decoded(response["reference"], n) == pytest.approx(
                row[f"ref_{side}_logps"].tolist(), rel=0.004, abs=0.001
            )
        margins.append(run.config.objective.beta * margin)
        assert pair["figures"]["margin"] == pytest.approx(margins[-1], abs=0.05)
    # What training has logged of the same pairs, by another program.
    last = [line for line in metrics.read(run.workdir) if "eval_rewards/margins" in line]
    logged = [line["eval_rewards/margins"] for line in last if line["step"] == STEPS][0]
    assert logged > 0.1 and np.mean(margins) == pytest.approx(logged, rel=0.02)
    figures = [pair["figures"]["margin"] for pair in held_out]
    assert np.mean(figures) == pytest.approx(logged, rel=1e-3)


def test_attention_is_by_order_and_layer(run, plain):
    pair = next(p for p in data_of(plain)["pairs"] if p["split"] == "held-out")
    row = Prepared.open(run.prepared_path("eval"))[0]
    attention = row["judge_chosen"]
    T = attention.shape[-1]
    first, second = ([a / a.sum() * T for a in order] for order in attention)
    apart = [b - a for a, b in zip(first, second, strict=True)]
    found = [decoded(text, T) for text in pair["responses"][0]["attention"]]
    np.testing.assert_allclose(found, [*first, *apart], rtol=0.004, atol=0.001)


def test_what_was_run_is_told(run, plain):
    text = "".join(Parsed(plain).texts)
    assert "optim.learning_rate" in text and "objective.beta" not in text  # the default's
    for told in ("prepare", "train", "export", "finished", f"from step 0 of {STEPS}", "1 cpu"):
        assert told in text or told.replace("1 cpu", "8 cpu") in text, told
    assert len(plain.encode()) < page.MOST_BYTES


def test_it_is_made_again_only_where_it_would_be_another(run, hostile):
    path = run.workdir / stage.FILE
    before = path.stat().st_mtime_ns
    assert report(run.workdir, console=QUIET) == path
    assert path.stat().st_mtime_ns == before
    report(run, pairs=3, console=QUIET)
    assert path.stat().st_mtime_ns > before
    assert len(data_of(path.read_text())["pairs"]) == 3


def test_pairs_that_a_page_has_no_room_for_are_left_out(run, monkeypatch):
    out = run.workdir / "small.html"
    report(run, out=out, pairs=0, console=QUIET)
    most = out.stat().st_size + 65_000
    monkeypatch.setattr(page, "MOST_BYTES", most)
    report(run, out=out, console=QUIET)
    content = out.read_bytes()
    assert most - 15_000 < len(content) < most
    text = content.decode()
    shown = len(data_of(text)["pairs"])
    assert 0 < shown < len(STRINGS) and f"{shown} of {len(STRINGS) + 8} prepared pairs" in text


def test_what_is_damaged_or_gone_is_told_and_the_rest_is_shown(run, tmp_path):
    workdir = tmp_path / "bare"
    workdir.mkdir()
    (workdir / "config.json").write_text(config_lib.to_json(run.config))
    (workdir / "evaluations" / "pairs").mkdir(parents=True)
    (workdir / "evaluations" / "pairs" / "base.json").write_text("{<b>")
    text = report(workdir, console=QUIET).read_text()
    parsed = Parsed(text)
    told = "".join(parsed.texts)
    assert "What could not be shown" in told and "damaged, or not written by attnpo" in told
    assert "not prepared, or not to the end" in told and "application/json" not in parsed.raw
    with pytest.raises(UsageError, match="no config.json there; accepted: the workdir of a run"):
        report(tmp_path)


def test_a_run_does_not_fail_for_its_report(run, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("a bug\nin it")

    monkeypatch.setattr(stage, "_write", broken)
    assert at_end(run) is None
    (line,) = [one for one in caplog.records if "no report was written" in one.message]
    assert line.levelname == "WARNING" and "\n" not in line.message
    with pytest.raises(RuntimeError):
        report(run, console=QUIET)


def test_a_notebook_and_a_terminal_show_the_same_weights(run, monkeypatch):
    view = attnpo_jax.token_view(run, pairs=4)
    assert len(view.pairs) == 4 and view.label == "as trained: attention"
    chosen = view.pairs[0].responses[0]
    data = Prepared.open(run.prepared_path("eval"))
    assert sum(weight for _, weight in chosen) == pytest.approx(data[0]["chosen_text_length"])
    parsed = Parsed(view._repr_html_())
    spans = [one for one in parsed.all("span") if "title" in one]
    tokens = [token for pair in view.pairs for response in pair.responses for token in response]
    assert [one["title"] for one in spans] == [f"{weight:.3g}" for _, weight in tokens]
    assert {tag for tag, _ in parsed.elements} <= {
        "div",
        "p",
        "strong",
        "br",
        "span",
        "em",
        "small",
    }
    first, weight = chosen[0]
    printed = printed_by(view, Console(width=500, force_terminal=True, color_system="truecolor"))
    assert "\x1b[30;48;2;" in printed and f"({weight:.2f})" not in printed
    monkeypatch.setenv("NO_COLOR", "1")
    for options in ({"force_terminal": True, "color_system": "truecolor"}, {}):
        bare = printed_by(view, Console(width=500, **options))
        assert f"{first}({weight:.2f})" in bare and "48;2" not in bare
        assert not re.search(r"\x1b(?!\[[01]?m)|\x9b|\u202e", bare)


def printed_by(view, console):
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def test_a_view_of_another_weighting(run, tmp_path):
    even = attnpo_jax.token_view(run, weighting="attention", layer=0, fix_sink=False, pairs=1)
    assert even.label == "attention(layer=0, fix_sink=False)"
    # Of what reads the policy, the newest checkpoint's is taken.
    chosen = attnpo_jax.token_view(run, weighting="confpo", pairs=1).pairs[0].responses[0]
    assert {weight for _, weight in chosen} == {0.0, 1.0}
    with pytest.raises(UserError, match="needs a value for 'column'"):
        attnpo_jax.token_view(run, weighting="sepo")
    with pytest.raises(UsageError, match="layer: of no weighting"):
        attnpo_jax.token_view(run, layer=0)


def test_trained_weights_that_read_the_policy_need_its_log_probs(run, tmp_path):
    config = run.config.copy_and_resolve_references()
    config_lib.complete_sections(config, weighting="confpo")
    config.report.policy = False
    workdir = tmp_path / "work"
    workdir.mkdir()
    (workdir / "prepared").symlink_to(run.workdir / "prepared")
    text = report(Run.resolve(config, workdir), console=QUIET).read_text()
    views = {view["key"]: view["missing"] for view in data_of(text)["views"]}
    assert "which are not here" in views["trained"] and views["uniform"] is None
    told = "".join(Parsed(text).texts)
    assert "The trained model's log-probs are not shown: config.report.policy is False." in told
