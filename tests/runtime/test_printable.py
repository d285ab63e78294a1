import io
import logging

import pytest
from rich.console import Console
from rich.table import Table

from attnpo_jax.runtime import program
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import Formatter, plain, printable, say
from attnpo_jax.runtime.progress import CountProgress

HOSTILE = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\",
    "C1": "\x9b31mred",
    "erase": "good\r\x1b[2Kbad\x08",
    "bidi": "abc\u202egpj.exe",
    "surrogate": "a\ud800b",
    "close": "[/red]",
    "style": "[bold red]x[/]",
    "markup link": "[link=http://evil]x[/link]",
    "click": "[@click=app.quit]x[/]",
    "emoji": ":smile:",
    "backslash": "x\\[/red]\\",
}
OBEYED = [chr(c) for c in range(32) if chr(c) not in "\t\n"] + list("\x7f\x9b\u202e\ud800\r")


@pytest.fixture(params=list(HOSTILE))
def text(request):
    return HOSTILE[request.param]


def test_what_a_terminal_obeys_is_written_out(text):
    shown = printable(text)
    assert not any(c in shown for c in OBEYED)
    shown.encode()
    if text.isascii() and text.isprintable():
        assert shown == text


def test_lines_and_tabs_stay():
    assert printable("a\tb\nc Ä 今 😀") == "a\tb\nc Ä 今 😀"
    assert printable("\x1b\x9b\ud800\u202e") == r"\x1b\x9b\ud800\u202e"
    assert printable(UserError("\x07")) == r"\x07"


def on_terminal(show):
    """What `show` leaves on a terminal that knows colours, without rich's own."""
    screen = io.StringIO()
    show(Console(file=screen, force_terminal=True, width=200, color_system=None))
    return screen.getvalue()


def test_rich_prints_it_as_it_is(text):
    assert on_terminal(lambda console: say(console, text)) == f"{printable(text)}\n"


def test_tables_have_it_as_it_is(text):
    def show(console):
        table = Table(title=plain(text))
        table.add_column(plain(text))
        table.add_row(plain(text))
        console.print(table)

    shown = on_terminal(show)
    assert shown.count(printable(text)) == 3


def test_bars_have_it_as_it_is(text):
    def show(console):
        with CountProgress(text, 8, "pairs", bar=True, console=console) as bar:
            bar.add(1)
            bar._bar.refresh()

    shown = on_terminal(show)
    assert printable(text) in shown
    assert "\x1b]" not in shown and "\x1b[31m" not in shown and "\x9b" not in shown


def test_logs_have_it_as_it_is(text):
    record = logging.LogRecord("a", logging.INFO, "f", 1, "pair %s", (text,), None)
    assert Formatter("%(message)s").format(record) == f"pair {printable(text)}"


def test_errors_have_it_as_it_is(text, capsys):
    def fails():
        raise UserError(f"pair {text}: bad")

    assert program.exit_code("attnpo", fails) == 1
    assert capsys.readouterr().err == f"attnpo: error: pair {printable(text)}: bad\n"


def test_tracebacks_have_it_as_it_is(text, capsys):
    program.show_traceback(RuntimeError(text))
    assert capsys.readouterr().err.endswith(f"RuntimeError: {printable(text)}\n")
