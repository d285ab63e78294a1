"""Figures: one look for all, files that are whole, and SVG that a page can hold.

    with style():
        figure, (axes,) = new_figure(height=2.0)
        axes.set_title(label(name))
        curve(axes, steps, means, lows, highs, place=1)
        save(figure, workdir / "plot.png")

matplotlib is imported where a figure is made, since it takes half a second. It draws without a
display, pyplot or the user's own settings. All text is taken as it is: no `$` begins a formula.
What comes from names and data goes through `label`.
"""

import contextlib
import functools
import io
import os
import pathlib
import re
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Told apart by colour-blind people too (Okabe and Ito 2008, without its yellow)."""
GREY = "#767676"
"""Of what others are held against, and of what is not to stand out."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
LINE_HEIGHT = 0.15
"""Inches that a line of small text takes, as labels of ticks are."""
_DPI = 160
_SVG = "http://www.w3.org/2000/svg"
# Texts are measured in the first; Verdana is as wide, others are narrower.
_FONTS = "'DejaVu Sans', Verdana, Arial, sans-serif"
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "attnpo",  # the same figure has the same ids
    "savefig.facecolor": "white",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Whatever is drawn in this block looks as all figures do; also a decorator, `@style()`."""
    import matplotlib

    # From the defaults: what the user's own settings say is no part of these figures.
    default = {k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"}
    with matplotlib.rc_context(default | _STYLE):
        yield


def new_figure(
    *, width: float = 7.0, height: float = 3.5, rows: int = 1, columns: int = 1, **options: Any
) -> tuple["Figure", list["Axes"]]:
    """An empty figure, laid out so that texts have the room that they need.

    Args:
      width, height: inches, of the whole figure.
      rows, columns: of its axes.
      options: as `matplotlib.figure.Figure.subplots` takes them, such as `sharex`.

    Returns:
      The figure, and its axes row by row.
    """
    with style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def look(place: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line at a place among others, from 0; 28 differ."""
    cycle = place // len(COLOURS) % len(DASHES)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[(place + cycle) % len(MARKERS)],
        "linestyle": DASHES[cycle],
    }


def curve(
    axes: "Axes",
    xs: Sequence[float],
    middles: Sequence[float],
    lows: Sequence[float] | None = None,
    highs: Sequence[float] | None = None,
    *,
    place: int | None = 0,
    name: str | None = None,
) -> None:
    """Draws a line, with a band where there is one; what is not finite leaves gaps.

    Args:
      axes: where.
      xs, middles, lows, highs: one a point.
      place: see `look`; None for a grey line, which others are held against.
      name: in the legend, if there is to be one.
    """
    with style():
        shown = {"color": GREY, "linestyle": "--"} if place is None else look(place)
        axes.plot(xs, middles, label=name and label(name), markersize=3, linewidth=1.4, **shown)
        if lows is not None and highs is not None:
            axes.fill_between(xs, lows, highs, color=shown["color"], alpha=0.18, linewidth=0)


def label(text: object, width: int = 40, lines: int = 3) -> str:
    r"""Text of others for a figure: on one line or some, with nothing in it that can't be drawn.

    >>> print(label("attention, layer=(0, 6, 14), beta=0.05", width=20))
    attention, layer=(0,
    6, 14), beta=0.05
    >>> print(label("a\x1b[31m$x$\u4e2d"))
    a\x1b[31m$x$\u4e2d

    Args:
      text: what to show.
      width: characters of a line.
      lines: the most there are; of what is longer, the middle is left out.
    """
    whole = " ".join(printable(text).split())
    known = _characters()
    whole = "".join(c if ord(c) in known else ascii(c)[1:-1] for c in whole)
    wrapped = textwrap.wrap(whole, width) or [""]
    if len(wrapped) > lines:
        half = (lines * width - 3) // 2
        wrapped = textwrap.wrap(f"{whole[:half]}…{whole[-half:]}", width)
        if len(wrapped) > lines:  # breaks at spaces leave lines short
            wrapped = [wrapped[0], *wrapped[1 : lines - 1], f"…{whole[1 - width :]}"][:lines]
    return "\n".join(wrapped)


@functools.cache
def _characters() -> frozenset[int]:
    """The characters that the font has."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def save(figure: "Figure", path: str | os.PathLike) -> None:
    """Writes the figure as its suffix says, .png or .svg, whole or not at all.

    Raises:
      OSError: the file can't be written.
    """
    path = pathlib.Path(path)
    drawn = _drawn(figure, "png") if path.suffix == ".png" else svg_text(figure, path.stem).encode()
    atomic.write_atomically(path, drawn)


def svg_text(figure: "Figure", name: str) -> str:
    """The figure as an `<svg>` element: a file, or a part of a page that leaves others in peace.

    Args:
      figure: what to draw.
      name: told to those who can't see it, and the start of the element's ids; of a page's figures,
        no two have the same.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(_drawn(figure, "svg"))
    prefix = re.sub(r"\W", "-", f"figure-{name}", flags=re.ASCII)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{prefix}-{value}"
            elif key == "style":
                value = value.replace("'DejaVu Sans'", _FONTS)
            elif key.endswith("href") and value.startswith("#"):
                value = f"#{prefix}-{value[1:]}"
            element.set(key, value.replace("url(#", f"url(#{prefix}-"))
        if element.tag == f"{{{_SVG}}}style":  # in a page it would be for all that is there
            element.text = f"#{prefix} {element.text}"
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    root.attrib |= {"id": prefix, "role": "img", "aria-label": label(name, width=200)}
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _drawn(figure: "Figure", form: str) -> bytes:
    with style():
        from matplotlib.text import Text

        # Also of texts that the caller has made outside.
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        content = io.BytesIO()
        figure.savefig(content, format=form, dpi=_DPI)
    return content.getvalue()
