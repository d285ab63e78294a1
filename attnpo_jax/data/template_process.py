"""Chat templates rendered by a process of their own, within limits of time and memory.

One such process serves all templates of a program. It is started when the first is seen, imports no
JAX, and is replaced when a template has it ended. Conversations that are announced are sent in one
go and rendered while this process is at work on those before.
"""

import atexit
import collections
import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from attnpo_jax.runtime.errors import UserError

# Conversations take a millisecond or less, and the largest of them some hundred megabytes.
CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30
MOST_CHARACTERS = 1 << 26
# Only a process that does not get to run takes so long.
WALL_SECONDS = 60.0
# A template that has the process ended so many times in a row is not rendered any more.
_STRIKES = 3
# Conversations that are sent, and answered, together.
_TOGETHER = 8
# Characters of what was rendered and not asked for yet.
_KEPT = 1 << 25
_WORKER = pathlib.Path(__file__).with_name("template_worker.py")
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT", "HOME")


class Refused(NamedTuple):
    """Why a conversation was not rendered, in one line."""

    reason: str


class StuckTemplate(UserError):
    """A template that takes more than it may, again and again."""


_Request = tuple[str, str]  # a template, and a conversation as JSON


class TemplateProcess:
    """The process, and what it has rendered. All methods may be called by several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: a fork of it has none
        self._read = b""
        self._template: str | None = None
        self._pending: collections.deque[_Request] = collections.deque()
        self._waiting: set[_Request] = set()  # the same
        # What was rendered since the last announcement, and since the one before.
        self._done: dict[_Request, str | Refused] = {}
        self._older: dict[_Request, str | Refused] = {}
        self._kept = 0
        self._strikes: collections.Counter[str] = collections.Counter()

    def start(self) -> None:
        """Starts it, if it is not there, and does not wait for it."""
        with self._lock:
            if self._owner != os.getpid():
                self._process, self._owner = None, os.getpid()
                self._forget()
            if self._process is None:
                self._process, self._read, self._template = _launch(), b"", None

    def stop(self) -> None:
        """Ends it."""
        with self._lock:
            process, self._process = self._process, None
            self._forget()
            if process is not None and self._owner == os.getpid():
                _end(process)

    def announce(self, conversations: Mapping[str, Sequence[str]]) -> None:
        """Has conversations rendered that will be asked for soon.

        What was rendered is kept until the second announcement after it.

        Args:
          conversations: by template; each as JSON: [messages, tools or null, whether the generation
            prompt is wanted, variables].
        """
        with self._to_its_end():
            self._done, self._older, self._kept = {}, self._done, 0
            for template, texts in conversations.items():
                if self._strikes[template] < _STRIKES:
                    self._send([(template, text) for text in dict.fromkeys(texts)])

    def render(self, template: str, conversation: str) -> str | Refused:
        """What a template writes for a conversation, as `announce` has it.

        Raises:
          StuckTemplate: the template had the process ended several times in a row.
        """
        request = (template, conversation)
        with self._to_its_end():
            if request in self._older:
                return self._older[request]
            while request not in self._done and request in self._waiting:
                self._receive()
            if request not in self._done:
                while self._pending:
                    self._receive()
                if self._strikes[template] >= _STRIKES:
                    raise StuckTemplate(
                        f"the chat template takes more time or memory than it may ({CPU_SECONDS} s "
                        f"of computing, {MEMORY_BYTES >> 20} MiB), {_STRIKES} times in a row; "
                        "accepted: another one (model.chat_template)"
                    )
                self._send([request])
                self._receive()
            return self._done[request]

    @contextlib.contextmanager
    def _to_its_end(self) -> Iterator[None]:
        """Holds the lock. What is cut off in between (Ctrl-C in a notebook) ends the process: its
        answers would be taken for those to other requests.
        """
        with self._lock:
            try:
                yield
            except UserError:
                raise
            except BaseException:
                self.stop()
                raise

    def _forget(self) -> None:
        self._pending.clear()
        self._waiting.clear()
        self._done, self._older, self._kept = {}, {}, 0

    def _send(self, requests: list[_Request]) -> None:
        """Sends conversations of one template, and takes note of them."""
        self._pending.extend(requests)
        self._waiting.update(requests)
        if not requests:
            return
        self.start()
        template = requests[0][0]
        try:
            for i in range(0, len(requests), _TOGETHER):
                named = None if template == self._template else template
                texts = ", ".join(text for _, text in requests[i : i + _TOGETHER])
                self._process.stdin.write(f"[{json.dumps(named)}, [{texts}]]\n".encode())
                self._template = template
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone: told when its answer is waited for

    def _receive(self) -> None:
        """Takes the answer to the request that waits longest."""
        line = self._line()
        request = self._pending.popleft()
        self._waiting.discard(request)
        if line is not None:
            rendered, text = json.loads(line)
            answer = text if rendered else Refused(_one_line(text))
            self._strikes[request[0]] = 0
        else:
            answer = Refused(self._why_it_ended())
            self._strikes[request[0]] += 1
        if self._kept > _KEPT:
            self._done.clear()
            self._kept = 0
        self._done[request] = answer
        self._kept += len(request[1]) + len(answer if line is not None else "")
        if line is None and self._pending:
            rest = list(self._pending)
            self._pending.clear()
            self._send(rest)

    def _line(self) -> bytes | None:
        """The next line of the process; None where it is gone, or says nothing for too long."""
        out, parts = self._process.stdout.fileno(), [self._read]
        end = time.monotonic() + WALL_SECONDS
        while b"\n" not in parts[-1]:
            ready, _, _ = select.select([out], [], [], max(0.0, end - time.monotonic()))
            part = os.read(out, 1 << 20) if ready else b""
            if not part:
                return None
            parts.append(part)
        line, _, rest = b"".join(parts).partition(b"\n")
        self._read = rest
        return line

    def _why_it_ended(self) -> str:
        process, self._process = self._process, None
        try:
            ended = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            ended = None
        _end(process)
        if ended in (None, -signal.SIGXCPU):
            return f"it takes more than {CPU_SECONDS} seconds"
        if ended > 0:
            raise UserError(
                f"chat templates can't be rendered: {sys.executable} {_WORKER} ended with status "
                f"{ended}; accepted: an environment in which transformers can be imported"
            )
        return f"it ended the process that renders it ({signal.Signals(-ended).name})"


def _launch() -> subprocess.Popen[bytes]:
    limits = {
        "cpu_seconds": CPU_SECONDS,
        "memory_bytes": MEMORY_BYTES,
        "most_characters": MOST_CHARACTERS,
    }
    settings = {"path": [os.path.abspath(entry) for entry in sys.path if entry], "limits": limits}
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-I", str(_WORKER), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # No token, no proxy: nothing there goes out. Threads of libraries would take memory.
        env=passed_on | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd=os.sep,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            pipe.close()
        except BrokenPipeError:
            continue


def _one_line(text: str, limit: int = 300) -> str:
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


process = TemplateProcess()
"""The program's."""
atexit.register(process.stop)
