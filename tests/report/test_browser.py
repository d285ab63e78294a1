"""The page in headless Chromium, where there is one."""

import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

from attnpo_jax import weighting
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.runtime.printable import printable
from attnpo_jax.weighting import ResponseTokens
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
    """A function of a page and of what is chosen there: what a browser makes of it."""

    def draw(page: pathlib.Path, chosen: str = "") -> Drawn:
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}/profile"]
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
