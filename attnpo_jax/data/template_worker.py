"""The process that renders chat templates; `template_process` starts it, and nothing imports it.

A template comes with a model, and may loop for ever or ask for all memory. Here the system ends it.
One line of JSON on standard input is a request, [template or null, [conversation, ...]], null for
the template of the request before; a conversation is [messages, tools, whether the generation
prompt is wanted, variables]. One line of JSON on standard output is the answer for a conversation,
[true, what was rendered] or [false, why not].
"""

import json
import os
import queue
import resource
import signal
import sys
import threading
import time
from typing import Any

_OPEN_FILES = 8


def _confine(memory_bytes: int) -> None:
    """Takes from this process what templates do not need."""
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # macOS does not limit the address space
            continue


def _rendered(render: Any, template: str, conversation: Any, limits: dict[str, int]) -> list[Any]:
    messages, tools, generation_prompt, variables = conversation
    soft = int(time.process_time()) + 1 + limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        ((text,), _) = render(
            [messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=generation_prompt,
            **variables,
        )
    except MemoryError:
        return [False, f"it needs more than {limits['memory_bytes'] >> 20} MiB of memory"]
    except Exception as error:  # whatever a template meets: it is told as one line
        return [False, str(error) or type(error).__name__]
    if len(text) > limits["most_characters"]:
        return [False, f"it writes {len(text)} characters, of {limits['most_characters']} allowed"]
    return [True, text]


def main() -> None:
    """Answers requests until standard input ends."""
    # Whoever started this ends it: Ctrl-C comes to both, and work that goes on there needs this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = json.loads(sys.argv[1])
    sys.path[:] = settings["path"]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    import jinja2.debug  # noqa: F401  wanted when a template fails, and no file can be opened then
    from transformers.utils.chat_template_utils import render_jinja_template

    limits = settings["limits"]
    _confine(limits["memory_bytes"])
    # Requests are taken as they come: whoever sends them may not read answers meanwhile.
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    template = ""
    while line := requests.get():
        named, conversations = json.loads(line)
        template = template if named is None else named
        for conversation in conversations:
            answer = _rendered(render_jinja_template, template, conversation, limits)
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()  # at once: the next one may be the end of this process


def _listen(requests: queue.SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        requests.put(line)
    requests.put(b"")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(0)
