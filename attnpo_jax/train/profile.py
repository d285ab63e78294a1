"""`log.profile`: a trace of some training steps by JAX's profiler, for xprof.

It begins before the first of these steps, after whatever else is due there, and ends when the last
one is done, before whatever is due then: evaluations, samples and checkpoints between two of them
are in it, those around them are not. A run that is told to stop, fails or ends in between leaves
the steps that it has done.
"""

import logging
import pathlib
import tempfile

import jax

from attnpo_jax.config.profiling import profiled
from attnpo_jax.parallel import processes
from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.train.loop import TrainLoop

_LOG = logging.getLogger(__name__)

FOLDER = "profile"
_SESSIONS = pathlib.Path("plugins", "profile")  # where xprof looks for them
_KINDS = ("xplane.pb", "trace.json.gz")


def steps_of(text: str, total_steps: int) -> range:
    """The steps that `log.profile` names, of a run of so many.

    Raises:
      UserError: the run has none of them.
    """
    steps = profiled(text)
    if steps and steps.start > total_steps:
        raise UserError(
            f"config.log.profile = {text!r}: the run has {total_steps} steps; accepted: a START of "
            f"{total_steps} at most"
        )
    return steps


class Profile:
    """The trace, as a context: one that is under way at the block's end is written then.

    Each process writes files of its own, `process-N.*`, into a folder that is named by the steps.

    Args:
      steps: those to trace, counted from 1; none if empty.
      workdir: the run's, that gets the folder `profile`.
    """

    def __init__(self, steps: range, workdir: pathlib.Path):
        self.steps = steps
        self._folder = workdir / FOLDER / _SESSIONS
        self._loop: TrainLoop | None = None  # while a trace is under way
        self._first = 0  # the first step in it

    @property
    def under_way(self) -> bool:
        return self._loop is not None

    def start(self, loop: TrainLoop) -> None:
        """Traces from here on."""
        jax.block_until_ready(loop.state)
        # Here first: what the workdir has is whole, and processes of one host do not meet.
        self._raw = tempfile.TemporaryDirectory()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a step that compiles calls millions of functions
        jax.profiler.start_trace(self._raw.name, profiler_options=options)
        self._loop, self._first = loop, loop.step + 1

    def stop(self) -> None:
        """Writes what was traced, if a step was."""
        loop, self._loop = self._loop, None
        with self._raw as raw:
            jax.profiler.stop_trace()
            if loop.step < self._first:
                return
            folder = self._folder / f"steps-{self._first}-{loop.step}"
            folder.mkdir(parents=True, exist_ok=True)
            for kind in _KINDS:
                for file in pathlib.Path(raw).glob(f"{_SESSIONS}/*/*.{kind}"):
                    path = folder / f"process-{jax.process_index()}.{kind}"
                    atomic.write_atomically(path, file.read_bytes())
        loop.speed.restart()
        if processes.is_first():
            _LOG.info("steps %d to %d are profiled, in %s", self._first, loop.step, folder)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind, error, _) -> None:
        if not self.under_way:
            return
        try:
            self.stop()
        except Exception as own:
            if kind is None:
                raise
            # What ended the run is told, and not this.
            _LOG.warning("the profile was not written: %s", own)


class Begin:
    """Starts a profile before its first step, or where the run begins among its steps."""

    def __init__(self, profile: Profile):
        self._profile = profile

    def begin(self, loop: TrainLoop) -> None:
        if self.is_due(loop):
            self(loop)

    def is_due(self, loop: TrainLoop) -> bool:
        goes_on = not loop.stops and loop.step < loop.total_steps
        following = loop.step + 1 in self._profile.steps
        return goes_on and following and not self._profile.under_way

    def __call__(self, loop: TrainLoop) -> None:
        self._profile.start(loop)


class End:
    """Stops a profile after its last step, and after the run's."""

    def __init__(self, profile: Profile):
        self._profile = profile

    def begin(self, loop: TrainLoop) -> None:
        pass

    def is_due(self, loop: TrainLoop) -> bool:
        ends = loop.stops or loop.step == loop.total_steps
        return self._profile.under_way and (ends or loop.step + 1 not in self._profile.steps)

    def __call__(self, loop: TrainLoop) -> None:
        jax.block_until_ready(loop.state)
        self._profile.stop()
