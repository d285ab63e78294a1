"""The page in headless Chromium, where there is one."""

import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess
import time

import numpy as np
import pytest

from attnpo_jax import weighting
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.report import page, token_data
from attnpo_jax.report.blocks import Section, Tokens
from attnpo_jax.report.numbers import PairNumbers
from attnpo_jax.report.shown import TokenTexts
from attnpo_jax.report.views import View
from attnpo_jax.runtime.printable import printable
from attnpo_jax.weighting import ResponseTokens
from tests import tiny
from tests.report.hostile import STRINGS

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here"),
]


class Drawn(html.parser.HTMLParser):
    """What the script has drawn: tokens, their numbers and colours, and the rest of the texts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts = [("", {})], []
        self.tokens, self.colours, self.numbers = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if "token" in attributes.get("class", "").split() and "data-place" in attributes:
            self.tokens.append("")
            self.colours.append(float(re.search(r"--a: ([\d.]+)", attributes["style"])[1]))

    def handle_data(self, data):
        self.texts.append(data)
        tag, attributes = self.tags[-1]
        if tag == "small":
            self.numbers.append(data)
        elif tag == "span" and "data-place" in attributes:
            self.tokens[-1] += data


@pytest.fixture
def drawn(tmp_path):
    """A function of a page, of what is chosen there, and of a file for the browser's log of all
    requests: what it makes of the page.
    """

    def draw(page: pathlib.Path, chosen: str = "", log: pathlib.Path | None = None) -> Drawn:
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}/profile"]
        command += [f"--log-net-log={log}"] if log else []
        ended = subprocess.run(
            [*command, f"{page.as_uri()}#{chosen}"],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"HOME": str(tmp_path)},
        )
        return Drawn(ended.stdout)

    return draw


def test_hostile_texts_stay_texts(run, hostile, drawn):
    found = drawn(run.workdir / "report.html", "sort=id&figures=true")
    tags = [tag for tag, _ in found.tags]
    assert tags.count("article") == 10 and tags.count("script") == 2 and tags.count("style") == 1
    assert not {"iframe", "object", "embed", "base", "svg", "math"} & {*tags}
    assert not [one for _, one in found.tags if [name for name in one if name.startswith("on")]]
    ids = sorted(f"{k} {printable(text)}" for k, text in enumerate(STRINGS))
    text = "".join(found.texts)
    assert "Pairs 1 to 10 of 58" in text
    heads = [one["id"] for tag, one in found.tags if tag == "h3"]
    assert len(heads) == 10 and all(id in text for id in ids[:4])


def test_no_request_leaves(run, hostile, drawn, tmp_path):
    log, image = tmp_path / "log.json", "<img src=https://evil.example/a.png>"
    drawn(run.workdir / "report.html", "sort=id", log)
    assert "report.html" in (told := log.read_text()) and "evil.example" not in told
    (tmp_path / "page.html").write_text(image)
    drawn(tmp_path / "page.html", log=log)
    assert "evil.example" in log.read_text()  # where one leaves, it is seen


def test_the_script_weighs_as_the_weighting_does(run, hostile, drawn):
    row = Prepared.open(run.prepared_path("eval"))[0]
    n, text = len(row["chosen_ids"]), row["chosen_text_length"]
    tokens = ResponseTokens.of(
        [[True] * n],
        text_mask_BT=[[k < text for k in range(n)]],
        judge_B2ST=np.pad(row["judge_chosen"], ((0, 0), (0, 0), (0, n - text)))[None],
    )
    for layer, order, fixes in ((0, "contrast", True), (1, "second", False), (0, "mean", True)):
        kind = "fixed" if fixes else "raw"
        chosen = f"colour=attention-{kind}&layer={layer}&order={order}&figures=true"
        found = drawn(run.workdir / "report.html", chosen)
        wanted = weighting.attention(tokens, layer=layer, order=order, fix_sink=fixes)[0]
        assert [float(x) for x in found.numbers[:n]] == pytest.approx(wanted.tolist(), abs=0.03)
        strengths = 0.85 * wanted / (wanted + 2)
        assert found.colours[:n] == pytest.approx(strengths.tolist(), abs=0.002)
    said = json.dumps("".join(found.tokens[:n]))
    assert said == json.dumps(f"{STRINGS[0]} yes<|im_end|>↵")


def test_search_finds_pairs_and_says_how_many(run, hostile, drawn):
    found = drawn(run.workdir / "report.html", "query=ONERROR&split=training")
    text = "".join(found.texts)
    assert "Pairs 1 to 1 of 1 found, of 58" in text
    assert sum(tag == "article" for tag, _ in found.tags) == 1


class Rows(list):
    """Rows of prepared pairs, as `token_data` takes them."""

    source_layers = (0,)

    @property
    def places(self):
        return [("train", row) for row in range(len(self))]


def write_large_page(file, count, views=24, tokens=10):
    """A page of so many pairs with random numbers, and all that a page has of short ones."""
    rng = np.random.default_rng(0)
    rows, numbers = Rows(), []
    for k in range(count):
        row = {"id": f"pair {k}", "prompt_ids": rng.integers(32, 127, 30)}
        for side in ("chosen", "rejected"):
            row[f"{side}_ids"] = rng.integers(32, 127, tokens)
            row[f"{side}_text_length"] = tokens
            row[f"judge_{side}"] = rng.random((2, 1, tokens))
            row[f"ref_{side}_logps"] = -5 * rng.random(tokens)
        rows.append(row)
        weights = {str(v): tuple(3 * rng.random((2, tokens))) for v in range(views)}
        policy = tuple(-5 * rng.random((2, tokens)))
        numbers.append(PairNumbers(weights, policy, None, rng.random(6)))
    named = [View(str(v), f"weighting {v}", "Random ones.") for v in range(views)]
    texts = TokenTexts(tiny.byte_tokenizer().backend_tokenizer)
    data = token_data.page_data(rows, named, numbers, texts, "step-1", page.MOST_BYTES - 50_000)
    section = Section("tokens", "Tokens", [Tokens(data)])
    file.write_bytes(page.render("Large", "", [section], made="", made_of="0" * 64))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    file = tmp_path_factory.mktemp("large") / "large.html"
    write_large_page(file, 2000)
    return file


@pytest.mark.parametrize("chosen", ["", "sort=concentrated&query=pair 1"])
def test_a_page_of_2000_pairs_opens_within_three_seconds(large, drawn, chosen):
    assert 2_500_000 < large.stat().st_size < page.MOST_BYTES
    seconds = []
    while len(seconds) < 5 and not any(took < 3 for took in seconds):  # others may be at work
        began = time.monotonic()
        found = drawn(large, chosen)
        seconds.append(time.monotonic() - began)  # with the browser's own start
    number = "1111 found, of 2000" if chosen else "2000"
    assert f"Pairs 1 to 10 of {number}" in "".join(found.texts)
    assert len(found.tokens) == 10 * 2 * 10
    assert seconds[-1] < 3, seconds
