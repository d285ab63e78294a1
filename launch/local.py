"""Runs one command as several processes of this machine that work together.

    python launch/local.py --processes=2 -- attnpo run --config=configs/quickstart.py --workdir=DIR

Every line of output has its process's number in front. SIGTERM and SIGINT are passed on: at the
first Ctrl-C the processes save and end, at the second they end at once. When a process fails, the
others get time to end by themselves, then they are killed; so are all that have not ended ten
minutes after a signal. Exit code: that of the first process that failed; 0 if none did.

On CPU, each process has one device unless `--devices` says otherwise.
"""

import argparse
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NoReturn

# What the processes' own fault detection may take; see attnpo_jax.parallel.processes.
GRACE_SECONDS = 60
# What saving on notice may take.
STOP_SECONDS = 600
# How long what a process has said may take to get here. Whoever it leaves behind, a loader of a
# killed one for example, may hold its output open for longer.
RELAY_SECONDS = 5
EXAMPLE = (
    "example: python launch/local.py --processes=2 -- "
    "attnpo run --config=configs/quickstart.py --workdir=runs/two"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(
    index: int, count: int, port: int, devices: int | None, secret: str
) -> dict[str, str]:
    environ = dict(os.environ)
    environ["ATTNPO_SECRET"] = environ.get("ATTNPO_SECRET") or secret
    environ["ATTNPO_COORDINATOR"] = f"127.0.0.1:{port}"
    environ["ATTNPO_NUM_PROCESSES"] = str(count)
    environ["ATTNPO_PROCESS_ID"] = str(index)
    if devices is not None:
        flag = "--xla_force_host_platform_device_count"
        others = re.sub(rf"{flag}=\d+", "", environ.get("XLA_FLAGS", ""))
        environ["XLA_FLAGS"] = f"{others} {flag}={devices}".strip()
    return environ


class Parser(argparse.ArgumentParser):
    """Of a command line that it can't use it says what a right one looks like."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\n{EXAMPLE}\n")


def say(line: str) -> None:
    """Prints a line in one piece: several threads do."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def relay(index: int, process: subprocess.Popen) -> None:
    """Copies a process's output, a line at a time so that lines do not mix."""
    for line in process.stdout:
        say(f"[{index}] {line}".removesuffix("\n"))


def report(codes: list[int | None], told: set[int]) -> None:
    """Says, once, how each process ended that did not end well."""
    for index, code in enumerate(codes):
        if code and index not in told:
            told.add(index)
            how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
            say(f"[{index}] process {index} of {len(codes)} ended: {how}")


def main() -> int:
    parser = Parser(
        description="Run a command as several local processes.",
        epilog=EXAMPLE,
        # Which would break the example's line elsewhere.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("--devices", type=int, help="virtual CPU devices of each process")
    parser.add_argument("command", nargs="+", help="after --, what each process runs")
    options = parser.parse_args()
    for name in ("processes", "devices"):
        number = getattr(options, name)
        if number is not None and number < 1:
            parser.error(f"--{name}={number}; accepted: 1 or more")
    if shutil.which(options.command[0]) is None:
        parser.error(f"there is no command {options.command[0]!r}")

    # By which the processes know each other; other users of this machine reach the port too.
    port, secret = free_port(), secrets.token_hex(32)
    running: list[subprocess.Popen] = []
    first_failure, deadline, told = 0, None, set()
    stopped, stopped_at = None, 0

    def pass_on(number, frame):
        nonlocal deadline, stopped, stopped_at
        stopped, stopped_at = number, len(running)
        if deadline is None:
            deadline = time.monotonic() + STOP_SECONDS
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    # Before there is any process: none may be left behind.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    for index in range(options.processes):
        running.append(
            subprocess.Popen(
                options.command,
                env=environment(index, options.processes, port, options.devices, secret),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # Or Ctrl-C would reach them from the terminal, and once more from here.
                start_new_session=True,
            )
        )
    if stopped is not None:
        for process in running[stopped_at:]:  # not started yet when it came
            process.send_signal(stopped)

    relays = [
        threading.Thread(target=relay, args=(index, process), daemon=True)
        for index, process in enumerate(running)
    ]
    for thread in relays:
        thread.start()

    while None in (codes := [process.poll() for process in running]):
        failed = [code for code in codes if code]
        report(codes, told)
        if failed and not first_failure:
            grace = time.monotonic() + GRACE_SECONDS
            first_failure, deadline = failed[0], min(grace, deadline or grace)
        if deadline is not None and time.monotonic() > deadline:
            for index, process in enumerate(running):
                if process.poll() is None:
                    say(f"[{index}] killed: it did not end by itself")
                    process.kill()
                    process.wait()
        time.sleep(0.1)
    for thread in relays:
        thread.join(RELAY_SECONDS)
    report(codes, told)
    first_failure = first_failure or next((code for code in codes if code), 0)
    # As shells say it: 128 and the number of the signal.
    return first_failure if first_failure >= 0 else 128 - first_failure


if __name__ == "__main__":
    sys.exit(main())
