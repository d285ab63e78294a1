"""`attnpo generate --interactive`: a chat in the terminal."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax.data.pair import Message
from attnpo_jax.data.prompts import Prompt
from attnpo_jax.generate import model as models
from attnpo_jax.generate.api import engine_for
from attnpo_jax.parallel import processes
from attnpo_jax.runtime import interrupts
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import printable
from attnpo_jax.sampling.engine import Engine
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.sampling.requests import encode
from attnpo_jax.sampling.responses import Request

if TYPE_CHECKING:
    from attnpo_jax.run import Run

HELP = (
    "/reset begins anew, /system TEXT sets the system message (none: removes it), /model NAME "
    "changes the model (trained, base, or any other), /quit or Ctrl-D ends; Ctrl-C stops an answer"
)


@dataclasses.dataclass
class Chat:
    """A conversation with one of several models.

    Attributes:
      load: gives a model by name.
      run: whose config says how answers are drawn.
      which: the model that answers.
      turns: what was said, without the system message.
      system: the system message, or None for the template's own.
    """

    run: "Run"
    load: Callable[[str | None], SampledModel]
    which: str | None = None
    turns: list[Message] = dataclasses.field(default_factory=list)
    system: str | None = None
    _sampled: SampledModel | None = None
    _engine: Engine | None = None

    def use(self, which: str | None) -> str:
        """Changes the model; the conversation stays. Its name."""
        sampled = self.load(which)
        most = self.run.config.generate.max_length or sampled.model.config.positions
        length = min(most, sampled.model.config.positions)
        self._engine = engine_for(
            sampled, self.run.config, length=length, slots=1, prefix_caching=True
        )
        self._sampled, self.which = sampled, which
        return sampled.name

    def answer(self, text: str) -> Iterator[str]:
        """Says something; yields the answer as it comes. What was given of it by then stays said.

        Raises:
          UserError: the conversation can't be answered; it is as it was before.
        """
        if self._engine is None:
            self.use(self.which)
        user = {"role": "user", "content": text}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompt = Prompt("chat", (*system, *self.turns, user))
        settings = self._sampled.settings(**config_lib.sampling(self.run.config.generate))
        tokens = encode(self._sampled, prompt)
        # Another turn is another draw.
        number = len(self.turns)
        request = Request("chat", tokens, settings, number, self._sampled.stop_tokens)
        self._engine.add(request)
        said = ""
        try:
            while self._engine.running or self._engine.waiting:
                for update in self._engine.step():
                    if update.response and update.response.finish_reason == "error":
                        raise UserError("the model's logits are no numbers (NaN or infinite)")
                    said += update.text
                    yield update.text
        finally:
            self._engine.cancel(request)
            if said:
                self.turns += [user, {"role": "assistant", "content": said}]

    def command(self, line: str) -> str:
        """Does what a line that begins with a slash says; what to show of it."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/reset":
                self.turns.clear()
                return "a new conversation"
            case "/system":
                self.system = rest or None
                return "system message set" if rest else "no system message"
            case "/model" if rest:
                return self.use(rest)
        return HELP


def chat(run: "Run", model: str | None, console: Console) -> None:
    """Reads lines from the terminal and answers them until Ctrl-D or /quit.

    Raises:
      UserError: there are several processes; the first model can't be loaded.
    """
    if processes.are_several():
        raise UserError("--interactive is for one process")
    talk = Chat(run, lambda which: models.load(run, which), model)
    _show(console, f"{talk.use(model)}\n{HELP}\n")
    while True:
        try:
            line = console.input("> ", markup=False).strip()
        except (EOFError, KeyboardInterrupt):
            _show(console, "\n")
            return
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                _show(console, talk.command(line) + "\n")
            elif line:
                with _interruptible() as stopped:
                    for text in talk.answer(line):
                        _show(console, text)
                        if stopped.is_set():
                            break
                _show(console, "\n")
        except (UserError, FileNotFoundError) as error:
            _show(console, f"{error}\n")


def _show(console: Console, text: str) -> None:
    console.print(printable(text), end="", highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets an event inside of the `with` block, and does nothing else."""
    stopped = threading.Event()
    outside = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        with interrupts.handed_over():
            yield stopped
    finally:
        signal.signal(signal.SIGINT, outside)
