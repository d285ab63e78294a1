"""The page: sections as one HTML file that needs nothing else and can do nothing else.

Jinja escapes all texts. The Content-Security-Policy lets the page's own style and script through by
their digests, and images that are part of the page; nothing may be fetched or sent.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib.resources
import itertools
import json
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe

import attnpo_jax
from attnpo_jax.report.blocks import Section
from attnpo_jax.runtime.printable import printable

MOST_BYTES = 5_000_000


def render(
    title: str, summary: str, sections: Sequence[Section], *, made: str, made_of: str
) -> bytes:
    """The page.

    Args:
      title: its heading.
      summary: what stands under it.
      sections: what it shows.
      made: when and by what it was made, for its foot.
      made_of: a digest of what it shows, see `stage`.
    """
    style, script = _asset("page.css"), _asset("page.js")
    content = {
        "title": title,
        "summary": summary,
        "sections": sections,
        "made": made,
        "made_of": made_of,
        "version": attnpo_jax.__version__,
        "policy": _policy(style, script),
        # The package's own, and neither holds the end of its element.
        "style": markupsafe.Markup(style),
        "script": markupsafe.Markup(script),
    }
    return _environment().get_template("page.html").render(content).encode()


def _policy(style: str, script: str) -> str:
    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


@functools.cache
def _asset(name: str) -> str:
    folder = importlib.resources.files("attnpo_jax.report") / "assets"
    return (folder / name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_safe,
    )
    environment.filters |= {"as_json": as_json, "as_image": as_image, "by_kind": by_kind}
    return environment


def _safe(value: Any) -> Any:
    """Texts without what turns their direction or is no character; Jinja escapes them then."""
    if isinstance(value, str) and not isinstance(value, markupsafe.Markup):
        return printable(value)
    return value


def as_json(value: Any) -> markupsafe.Markup:
    """JSON for an element of a page, which nothing in it can end.

    >>> print(as_json({"</script>": "<!--"}))
    {"\\u003c/script\\u003e":"\\u003c!--"}
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return markupsafe.Markup(text)


def as_image(svg: str) -> str:
    """An `<svg>` element as the address of an image."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Neighbouring blocks of one kind."""

    kind: str
    blocks: list[Any]


def by_kind(blocks: Sequence[Any]) -> list[Stretch]:
    """Neighbours of one kind together, in order: pictures stand side by side."""
    return [
        Stretch(kind, list(some)) for kind, some in itertools.groupby(blocks, key=lambda b: b.kind)
    ]
