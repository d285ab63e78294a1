"""Runs that chaos befalls, against the undisturbed ones.

    python -m tests.chaos --runs 50

Each draws by lot a stage, a number of processes, what befalls it and when. What was cut off is
started again, undisturbed. It must end like the undisturbed run, or with one clear message; where a
message tells what to delete, that is deleted, and the run is started once more.
"""

import argparse
import collections
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax

from tests.chaos.runs import STAGES, TOLERANCE, Attnpo, End, write_setting

_OF_LAUNCHER = re.compile(r"\] (process \d+ of \d+ ended:|killed: it did not end by itself)")
LIKE, MESSAGE, BAD = "like the undisturbed run", "one clear message", "neither"
RESTARTS = 3


class Chaos:
    """A setting, its undisturbed runs, and faults that befall others.

    Args:
      folder: for all that is written.
      seed: of what is drawn by lot.
    """

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self.lot = folder, random.Random(seed)
        self.config = write_setting(folder)
        self.undisturbed: dict[tuple[str, int], tuple[pathlib.Path, float]] = {}

    def expected(self, stage: str, count: int) -> tuple[pathlib.Path, float]:
        """The undisturbed run of a stage by so many processes, and its seconds."""
        key = stage, count
        if key not in self.undisturbed:
            workdir = self.folder / f"undisturbed-{stage}-{count}"
            if before := STAGES[stage].begins_with:
                shutil.copytree(self.expected(before, count)[0], workdir)
            end = Attnpo(self.config, workdir, STAGES[stage].command, count).end()
            assert end.code == 0, end.output
            self.undisturbed[key] = workdir, end.seconds
        return self.undisturbed[key]

    def run(self, number: int, fault: str, stage: str, count: int) -> tuple[str, str]:
        """What came of a run that the fault befell: LIKE, MESSAGE or BAD, and why."""
        expected, seconds = self.expected(stage, count)
        workdir = self.folder / f"run-{number}"
        workdir.mkdir()
        self.count, self.command, self.seconds = count, STAGES[stage].command, seconds
        try:
            if before := STAGES[stage].begins_with:
                source = self.expected(before, count)[0]
                self._begin = lambda: shutil.copytree(source, workdir, dirs_exist_ok=True)
            else:
                self._begin = lambda: None
            ends = getattr(self, f"_{fault}")(workdir, expected)
            ends += self._finish(workdir)
            for end in ends:
                if not end.is_clear:
                    return BAD, end.output[-3000:]
            if ends[-1].code:
                return MESSAGE, ends[-1].errors[0]
            STAGES[stage].same(workdir, expected, TOLERANCE if count > 1 else 0.0)
            return LIKE, ""
        except AssertionError as error:
            return BAD, str(error)[:3000]
        finally:
            shutil.rmtree(workdir, ignore_errors=True)

    def _start(self, workdir: pathlib.Path, *options: str, **environ: str) -> Attnpo:
        return Attnpo(self.config, workdir, self.command, self.count, options, environ)

    def _finish(self, workdir: pathlib.Path) -> list[End]:
        """Starts it, undisturbed, until it is done or has said what only a user can mend."""
        ends = []
        for _ in range(RESTARTS):
            ends.append(self._start(workdir).end())
            if ends[-1].code == 0 or not ends[-1].is_clear or not _mend(ends[-1], workdir):
                break
        return ends

    # --- What befalls a run; each returns how the commands ended that must end clearly -----------

    def _kill(self, workdir: pathlib.Path, _) -> list[End]:
        """SIGKILL to one process, at any time; often more than once."""
        self._begin()
        for _ in range(self.lot.choice((1, 1, 2, 3))):
            attnpo = self._start(workdir)
            time.sleep(self.lot.uniform(0, self.seconds))
            attnpo.signal(signal.SIGKILL, self.lot.randrange(self.count))
            end = attnpo.end()
            # One that waits for another to join it does so for five minutes, if that is gone, and
            # has said nothing then: all there is are the launcher's words.
            joined = any(not _OF_LAUNCHER.search(line) for line in end.output.splitlines() if line)
            assert not joined or "did not end by itself" not in end.output, end.output[-2000:]
        return []

    def _terminate(self, workdir: pathlib.Path, _) -> list[End]:
        """SIGTERM to one process, at any time."""
        self._begin()
        attnpo = self._start(workdir)
        time.sleep(self.lot.uniform(0, self.seconds))
        attnpo.signal(signal.SIGTERM, self.lot.randrange(self.count))
        end = attnpo.end()
        # Before its handler is there, or while nothing can be saved, SIGTERM ends a process.
        return [] if end.code in (-signal.SIGTERM, 128 + signal.SIGTERM) else [end]

    def _full_disk(self, workdir: pathlib.Path, expected: pathlib.Path) -> list[End]:
        """A disk with less room than the run needs, and then with enough."""
        needed = sum(f.stat().st_size for f in expected.rglob("*") if f.is_file())
        room = int(needed * self.lot.uniform(0.05, 1.0))
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", workdir], capture_output=True
        )
        if mounted.returncode:
            self._begin()
            return [self._start(workdir, CHAOS_ROOM=str(room)).end()]
        try:
            try:
                self._begin()
            except (OSError, shutil.Error):
                room += needed
                subprocess.run(["mount", "-o", f"remount,size={room}", workdir], check=True)
                self._begin()
            end = self._start(workdir).end()
            subprocess.run(["mount", "-o", f"remount,size={20 * needed}", workdir], check=True)
            ends = [end, *self._finish(workdir)]
            kept = workdir.with_name(f"{workdir.name}-kept")
            shutil.copytree(workdir, kept)
        finally:
            subprocess.run(["umount", workdir], check=True)
        shutil.copytree(kept, workdir, dirs_exist_ok=True)
        shutil.rmtree(kept)
        return ends

    def _flip(self, workdir: pathlib.Path, expected: pathlib.Path) -> list[End]:
        """One bit of one file of a run that was cut off, or is done."""
        self._begin()
        if self.lot.random() < 0.5:
            shutil.copytree(expected, workdir, dirs_exist_ok=True)
        else:
            attnpo = self._start(workdir)
            time.sleep(self.lot.uniform(0.5, 1) * self.seconds)
            attnpo.signal(signal.SIGKILL, self.lot.randrange(self.count))
            attnpo.end()
        files = sorted(f for f in workdir.rglob("*") if f.is_file() and f.stat().st_size)
        # What is in an export is not read again.
        files = [f for f in files if "export" not in f.relative_to(workdir).parts]
        if files:
            file = self.lot.choice(files)
            content = bytearray(file.read_bytes())
            content[self.lot.randrange(len(content))] ^= 1 << self.lot.randrange(8)
            file.write_bytes(content)
        return []

    def _clock(self, workdir: pathlib.Path, _) -> list[End]:
        """A wall clock that jumps by up to a day, and a kill."""
        self._begin()
        attnpo = self._start(workdir, CHAOS_CLOCK="86400")
        if self.lot.random() < 0.5:
            time.sleep(self.lot.uniform(0, self.seconds))
            attnpo.signal(signal.SIGKILL, self.lot.randrange(self.count))
            attnpo.end()
            return []
        return [attnpo.end()]

    def _two_starts(self, workdir: pathlib.Path, _) -> list[End]:
        """Another start meanwhile, which must be refused; or be first, and refuse this one."""
        self._begin()
        first = self._start(workdir)
        time.sleep(self.lot.choice((0, self.lot.uniform(0, self.seconds))))
        second = self._start(workdir)
        ends = [first.end(), second.end()]
        assert all(end.is_clear for end in ends), "\n".join(end.output[-2000:] for end in ends)
        refused = [end for end in ends if end.code]
        assert len(refused) <= 1, [end.errors for end in ends]
        assert all("is being written by" in end.errors[0] for end in refused), refused[0].output
        return ends if not refused else [end for end in ends if not end.code]


FAULTS = ("kill", "terminate", "full_disk", "flip", "clock", "two_starts")


def _mend(end: End, workdir: pathlib.Path) -> bool:
    """Does what a message says is to be deleted; whether there was such a thing."""
    found = re.search(r"delete (?:the folder )?(it|this file|/\S+)\b", " ".join(end.errors))
    if found is None:
        return False
    named = re.search(rf"({re.escape(str(workdir))}[^\s:;,]*)", end.errors[0])
    path = pathlib.Path(found[1] if found[1].startswith("/") else named[1])
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of them, between commas")
    parser.add_argument("--processes", default="1,2", help="numbers of processes, between commas")
    parser.add_argument("--stages", default=",".join(STAGES))
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    ways: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="attnpo-chaos-") as folder:
        chaos = Chaos(pathlib.Path(folder), options.seed)
        faults = options.faults.split(",")
        for number in range(options.runs):
            fault = faults[number % len(faults)]
            stage = chaos.lot.choice(options.stages.split(","))
            count = int(chaos.lot.choice(options.processes.split(",")))
            way, why = chaos.run(number, fault, stage, count)
            print(f"{number}: {fault}, {stage}, {count} processes: {way} {why}", flush=True)
            ways[fault][way] += 1
            bad += way == BAD
    print(f"\n| what befalls it | runs | {LIKE} | {MESSAGE} | {BAD} |\n|---|---|---|---|---|")
    for fault, found in ways.items():
        row = (found.total(), found[LIKE], found[MESSAGE], found[BAD])
        print(f"| {fault.replace('_', ' ')} | {' | '.join(map(str, row))} |")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
