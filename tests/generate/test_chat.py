"""The chat in the terminal: the lines that are typed, what is shown, and Ctrl-C."""

import io
import os
import signal

import pytest
from rich.console import Console

from attnpo_jax import load_model
from attnpo_jax.generate import generate, stage
from attnpo_jax.run import Run
from tests import tiny

SETTINGS = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.write_small_inputs(folder)
    return folder


class Terminal(Console):
    """Types lines, one after another, then Ctrl-D; None is Ctrl-C at the prompt."""

    def __init__(self, lines):
        super().__init__(file=io.StringIO(), width=300)
        self._lines = iter(lines)
        self.shown = []  # what came before each prompt

    def input(self, prompt="", *, markup=True, **options):
        assert prompt == "> " and not markup
        self.shown.append(self.file.getvalue())
        self.file.truncate(0), self.file.seek(0)
        line = next(self._lines, EOFError)
        if line is None:
            raise KeyboardInterrupt
        if line is EOFError:
            raise EOFError
        return line


def chat(folder, *lines, terminal=None, **changes):
    """What was shown, from prompt to prompt."""
    changes = {f"generate__{name}": value for name, value in (SETTINGS | changes).items()}
    run = Run.resolve(tiny.small_config(folder, **changes), None)
    terminal = terminal or Terminal(lines)
    stage.generate(run, model="base", interactive=True, console=terminal)
    return terminal.shown


def answer(folder, text):
    (response,) = generate(load_model(str(folder / "model")), [text], **SETTINGS)
    return response.text


def test_lines_are_answered_until_the_end(folder):
    start, blank, first, unknown, anew, again = chat(
        folder, "", "Why?", "/what", "/reset", " Why? "
    )
    assert "Ctrl-C stops an answer" in start and start.startswith(str(folder / "model"))
    assert blank == ""
    assert first == again == answer(folder, "Why?") + "\n"
    assert "/system TEXT" in unknown and anew == "a new conversation\n"


@pytest.mark.parametrize("end", ["/quit", "/exit", None])
def test_it_ends(folder, end):
    assert len(chat(folder, end, "not read")) == 1


def test_what_cannot_be_done_is_said_and_the_chat_goes_on(folder):
    _, long, model, answered = chat(folder, "la " * 400, "/model nowhere/at-all", "Why?")
    assert "tokens" in long and long.count("\n") == 1
    assert "nowhere/at-all" in model
    assert answered == answer(folder, "Why?") + "\n"


def test_escape_sequences_of_an_error_are_not_sent_to_the_terminal(folder):
    _, error = chat(folder, "/model \x1b]0;title\x07[red]x")
    assert "\x1b" not in error and "\x07" not in error and "[red]x" in error


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(folder):
    class Impatient(Terminal):
        pieces = 0

        def print(self, *objects, **options):
            super().print(*objects, **options)
            # The first piece of the answer, not what is said at the start.
            if len(self.shown) == 2 and objects[0].strip() and not self.pieces:
                self.pieces += 1
                os.kill(os.getpid(), signal.SIGINT)

    outside = signal.getsignal(signal.SIGINT)
    terminal = Impatient(["/reset", "Why?", "/reset", "Why?"])
    _, _, stopped, _, whole = chat(folder, terminal=terminal, max_new_tokens=100)
    assert terminal.pieces == 1
    assert whole.startswith(stopped.rstrip("\n")) and len(stopped) < len(whole)
    assert signal.getsignal(signal.SIGINT) is outside
