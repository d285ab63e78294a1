"""Templates that do what they may not: the row is refused in one line, and nothing else happens."""

import os
import pathlib
import signal
import sys

import pytest

from attnpo_jax.data import template_process
from attnpo_jax.data.chat_template import ChatTemplate, Conversation
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.template_process import Refused, StuckTemplate, TemplateProcess
from tests import tiny

ASKED = Conversation(({"role": "user", "content": "Why?"},), generation_prompt=True)
SANDBOX = "{{ ''.__class__.__mro__[1].__subclasses__() }}"

# What a template is, and what the error says of it.
HOSTILE = {
    "endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "takes more than 1 seconds",
    ),
    "endless power": ("{{ 10 ** (10 ** 9) }}", "takes more than 1 seconds"),
    "4 GB": ("{{ 'a' * 4000000000 }}", "more than 512 MiB of memory|too large|longer than"),
    "long text": ("{{ 'a' * 1100000 }}", "1100000 characters, of 1000000 allowed"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "classes": (SANDBOX, "unsafe"),
    "import": ("{% import '/etc/passwd' as x %}{{ x }}", "loader"),
    "include": ("{% include '/etc/passwd' %}", "loader"),
    "globals": ("{{ lipsum.__globals__['os'].popen('id').read() }}", "unsafe|undefined"),
    "cycler": ("{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe|undefined"),
    "syntax": ("{% if %}", "Expected"),
    "division": ("{{ 1 // 0 }}", "zero"),
    "lines": ("{{ raise_exception('a\\nb\\n\\nc') }}", "a b c$"),
    "unknown": ("{{ messages.nothing.at_all }}", "no attribute|undefined"),
    "escapes": ("{{ raise_exception('\\x1b[31mred') }}", "red"),
}


@pytest.fixture
def limited(monkeypatch):
    """A process of its own, with small limits."""
    for name, value in (
        ("CPU_SECONDS", 1),
        ("MEMORY_BYTES", 512 << 20),
        ("MOST_CHARACTERS", 1_000_000),
    ):
        monkeypatch.setattr(template_process, name, value)
    made = TemplateProcess()
    monkeypatch.setattr("attnpo_jax.data.chat_template.process", made)
    yield made
    made.stop()


def template(text):
    return ChatTemplate(tiny.byte_tokenizer(chat_template=text), "folder", {})


def test_a_hostile_template_is_refused_in_one_line(limited, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (text, message) in HOSTILE.items():
        with pytest.raises(BadExample, match=message) as caught:
            template(text).render(ASKED)
        reason = caught.value.reason
        assert reason.startswith("folder: the chat template refuses"), name
        assert "\n" not in reason and len(reason) < 500, name
        # It is there for the next one.
        assert template("{{ messages[0].content }}").render(ASKED) == "Why?", name
    assert list(tmp_path.iterdir()) == []


def test_what_is_announced_behind_a_hostile_conversation_is_rendered(limited):
    loops = template(
        "{% if messages[0].content == 'b' %}{{ 10 ** (10 ** (8 + messages|length)) }}{% endif %}hi"
    )
    asked = [Conversation(({"role": "user", "content": c},)) for c in "abcd"]
    loops.announce(asked)
    with pytest.raises(BadExample, match="more than 1 seconds"):
        loops.render(asked[1])
    assert [loops.render(asked[i]) for i in (0, 2, 3)] == ["hi"] * 3


def test_a_template_that_never_ends_is_given_up(limited):
    loops = template("{{ 10 ** (10 ** 9) }}")
    for content in "abc":
        with pytest.raises(BadExample):
            loops.render(Conversation(({"role": "user", "content": content},)))
    with pytest.raises(StuckTemplate, match="folder: .*3 times in a row; accepted: another one"):
        loops.render(ASKED)
    loops.announce([ASKED])
    assert template("fine").render(ASKED) == "fine"


def test_the_process_is_replaced_when_it_is_gone(limited):
    plain = template("{{ messages[0].content }}!")
    assert plain.render(ASKED) == "Why?!"
    os.kill(limited._process.pid, signal.SIGKILL)
    other = Conversation(({"role": "user", "content": "How?"},))
    with pytest.raises(BadExample, match="it ended the process that renders it .SIGKILL"):
        plain.render(other)
    assert plain.render(Conversation(({"role": "user", "content": "Who?"},))) == "Who?!"


def test_the_process_knows_neither_jax_nor_this_ones_environment(limited, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    limited.start()
    assert template("x").render(ASKED) == "x"
    process = pathlib.Path("/proc") / str(limited._process.pid)
    if not process.is_dir():
        pytest.skip("no /proc here")
    assert b"secret" not in (process / "environ").read_bytes()
    maps = (process / "maps").read_text()
    assert "jaxlib" not in maps and "transformers" not in str(sys.argv)
    opened = [os.readlink(file) for file in (process / "fd").iterdir()]
    assert all(file.startswith("pipe:") or file == "/dev/null" for file in opened)


def test_ctrl_c_leaves_it_alone(limited):
    assert template("a").render(ASKED) == "a"
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(limited._process.pid, number)
    assert template("b").render(ASKED) == "b"


@pytest.mark.parametrize("at", range(12))
def test_who_is_interrupted_takes_no_answer_for_another_s(limited, monkeypatch, at):
    """Ctrl-C in a notebook, where the process lives on: after so many lines are read."""
    plain = template("{{ messages[0].content }}")
    asked = [Conversation(({"role": "user", "content": str(i)},)) for i in range(20)]
    line, calls = limited._line, []

    def interrupted():
        found = line()
        calls.append(found)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(limited, "_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plain.announce(asked)
        for conversation in asked:
            plain.render(conversation)
    assert [plain.render(c) for c in reversed(asked)] == [str(i) for i in reversed(range(20))]


def test_conversations_that_are_announced_take_one_message_each(limited, monkeypatch):
    sent = []
    send = limited._send
    monkeypatch.setattr(
        limited, "_send", lambda requests: sent.append(len(requests)) or send(requests)
    )
    plain = template("{{ messages[0].content }}")
    asked = [Conversation(({"role": "user", "content": str(i)},)) for i in range(30)]
    plain.announce(asked)
    assert [plain.render(c) for c in asked] == [str(i) for i in range(30)]
    plain.announce([])
    assert plain.render(asked[3]) == "3"  # kept until the second announcement
    assert sent == [30]


def test_surrogates_and_long_texts_come_through(limited):
    text = "\ud800" + "ä" * 300_000 + "\x00\n\u2028"
    conversation = Conversation(({"role": "user", "content": text},))
    assert template("{{ messages[0].content }}").render(conversation) == text
    assert isinstance(limited.render("{{ x", "[[], null, false, {}]"), Refused)
