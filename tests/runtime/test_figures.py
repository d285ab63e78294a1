"""Figures of whatever names: no formula, no markup, nothing of one in another, no half a file."""

import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

import attnpo_jax
from attnpo_jax.runtime import figures

HOSTILE = "$\\frac{1}{$ </text><script>x</script> & --> \x1b[31m \ud800 \u4e2d \uffff %s {0}"
SVG = "{http://www.w3.org/2000/svg}"


def drawn(name):
    with figures.style():
        figure, (axes,) = figures.new_figure()
        figures.curve(axes, [0, 1, 2], [0.0, float("nan"), 1.0], [0, 0, 0], [1, 1, 1], name=name)
        figures.curve(axes, [0, 1], [0, 1], place=None, name="$a$")
        axes.legend()
        axes.set_xticks([0, 1], labels=["$\\alpha", "$b_1$"])
    return figure


def test_names_stay_text():
    root = ElementTree.fromstring(figures.svg_text(drawn(HOSTILE), HOSTILE))
    texts = " ".join(" ".join(one.itertext()) for one in root.iter(f"{SVG}text"))
    for part in ("$\\frac{1}{$ </text><script>x</script> &", "\\x1b[31m \\ud800 \\u4e2d \\uffff",
                 "$a$", "$\\alpha", "$b_1$"):  # fmt: skip
        assert part in " ".join(texts.split())
    assert not list(root.iter(f"{SVG}script"))
    assert root.attrib["aria-label"].startswith("$\\frac{1}{$ </text>")


def test_figures_of_a_page_share_no_ids_and_style_themselves_alone():
    roots = [ElementTree.fromstring(figures.svg_text(drawn("x"), name)) for name in ("a", "b")]
    ids = [{one.get("id") for one in root.iter() if one.get("id")} for root in roots]
    assert not ids[0] & ids[1]
    for root, own in zip(roots, ids, strict=True):
        (style,) = root.iter(f"{SVG}style")
        assert style.text.startswith(f"#{root.get('id')} ")
        used = [one.get("clip-path")[5:-1] for one in root.iter() if one.get("clip-path")]
        assert used and set(used) <= own
        for one in root.iter():
            link = one.get("{http://www.w3.org/1999/xlink}href")
            assert link is None or link[1:] in own


def test_long_names_are_wrapped_and_cut_in_the_middle():
    name = "attention, layer=(0, 6, 14, 21, 29), beta=0.05, seed=" + "1" * 20
    assert figures.label(name, 30).split() == name.split()
    assert max(map(len, figures.label(name, 30).splitlines())) <= 30
    for long in ("x" * 500 + "end", "word " * 200 + "end"):
        lines = figures.label(long, 20).splitlines()
        assert len(lines) <= 3 and max(map(len, lines)) <= 20
        assert lines[-1].endswith("end") and "…" in "".join(lines)
    assert figures.label("") == ""


def test_a_file_is_whole_and_the_same_each_time(tmp_path):
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<svg ")):
        files = [tmp_path / one / f"plot{suffix}" for one in ("a", "b")]
        for file in files:
            file.parent.mkdir(exist_ok=True)
            figures.save(drawn("x"), file)
        assert files[0].read_bytes().startswith(start)
        assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(OSError):
        figures.save(drawn("x"), tmp_path / "nowhere" / "plot.png")


def test_looks_differ():
    assert len({tuple(figures.look(place).values()) for place in range(28)}) == 28


def test_matplotlib_is_imported_where_something_is_drawn_and_pyplot_never():
    for file in pathlib.Path(attnpo_jax.__file__).parent.rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"^(import|from) matplotlib", text, re.MULTILINE), file
        assert "pyplot" not in text or file.name == "figures.py", file
    code = """
import sys
from attnpo_jax.runtime import figures
assert "matplotlib" not in sys.modules
figures.new_figure()
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
