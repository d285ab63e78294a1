"""The samples file: JSON lines, one a response, written as responses finish.

They first go to a journal beside it, in the order in which they finish; when all are there, the
file appears as a whole, in the order of the prompts, so that an interruption leaves no trace in it.
"""

import json
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from attnpo_jax.data.prompts import Prompt
from attnpo_jax.runtime import atomic, json_files
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling.responses import Request, Response

# Log-probs are the same up to rounding only, whatever is beside a response.
_DIGITS = 3


class SamplesMismatch(UserError):
    """There are samples under this name already, and they are of something else."""


class Samples:
    """The samples of one model on some prompts.

    Args:
      path: the file.
      model: the name of what is sampled.
      prompts: by id, those that are answered.
      part: which process this is, of those that each write responses of their own.
    """

    def __init__(self, path: pathlib.Path, model: str, prompts: Sequence[Prompt], part: int = 0):
        self.path = path
        self._model = model
        self._prompts = {prompt.id: list(prompt.messages) for prompt in prompts}
        self._journal = path.with_name(f".{path.name}.part-{part}")
        self._file = None

    @property
    def journals(self) -> list[pathlib.Path]:
        """What unfinished work has left, of all processes."""
        return sorted(self.path.parent.glob(f".{self.path.name}.part-*"))

    def done(self, requests: Iterable[Request]) -> dict[tuple[str, int], dict[str, Any]]:
        """The records that are there already, by id and number, of those that are wanted.

        A file that is finished may lack prompts, such that could not be answered or are new.

        Raises:
          SamplesMismatch: there are others too, or their prompt, model or settings are other ones;
            or prompts that are there have fewer samples.
        """
        wanted = {(request.id, request.sample): request for request in requests}
        found = {}
        for file in (self.path, *self.journals):
            for record in read(file):
                key = record["id"], record["sample"]
                self._check(file, record, wanted.get(key))
                found[key] = record
            if file == self.path:
                ids = {id for id, _ in found}
                missing = sum(key not in found for key in wanted if key[0] in ids)
                if missing:
                    raise SamplesMismatch(
                        f"{file}: finished with {len(found)} responses, {missing} more of the same "
                        "prompts are wanted; accepted: as many samples as there are, another "
                        "--name or --out, or remove the file"
                    )
        return found

    def _check(self, file: pathlib.Path, record: dict[str, Any], request: Request | None) -> None:
        id, number = record["id"], record["sample"]
        if request is None:
            told = f"response {number} to prompt {id}, which is not asked for"
        else:
            now = self._of(request)
            told = next(
                (
                    f"{name} of response {number} to prompt {id} is {record.get(name)!r}, now "
                    f"{now[name]!r}"
                    for name in ("model", "settings", "prompt")
                    if record.get(name) != now[name]
                ),
                None,
            )
        if told is not None:
            raise SamplesMismatch(
                f"{file}: {told}; accepted: the same model, prompts and settings, another --name "
                "or --out, or remove the file"
            )

    def _of(self, request: Request) -> dict[str, Any]:
        return {
            "prompt": self._prompts[request.id],
            "model": self._model,
            "settings": request.settings.facts() | {"end_tokens": list(request.ends)},
        }

    def add(self, request: Request, response: Response) -> None:
        """Writes a response that is finished."""
        if self._file is None:
            self._file = _appending(self._journal)
        record = self._of(request) | {
            "id": response.id,
            "response": response.text,
            "sample": response.sample,
            "finish_reason": response.finish_reason,
            "tokens": list(response.tokens),
            "logprob": round(sum(response.logprobs), _DIGITS),
        }
        order = ("id", "prompt", "response", "sample", "finish_reason", "tokens", "logprob")
        record = {name: record[name] for name in (*order, "model", "settings")}
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the journal; what was added is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(
        self, requests: Sequence[Request], failed: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Writes the file from the journals, in the order of the requests, and removes those.

        Args:
          failed: ids of prompts that could not be answered; the file has nothing of them.

        Returns:
          The records.
        """
        found = self.done(requests)
        keys = ((r.id, r.sample) for r in requests if r.id not in failed)
        records = [found[key] for key in keys if key in found]
        if self.journals or not self.path.exists():
            atomic.write_json_lines(self.path, records)
        for journal in self.journals:
            journal.unlink()
        return records


def _appending(file: pathlib.Path):
    """A file open behind its last whole line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = open(file, "ab+")
    opened.seek(0)
    whole = opened.read().rfind(b"\n") + 1
    opened.truncate(whole)
    opened.seek(0, os.SEEK_END)
    return opened


def read(file: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The records of a file; a last line without its end was cut off and counts for nothing.

    Raises:
      UserError: a line is no record.
    """
    if not file.exists():
        return
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json_files.loads(line)
            if not isinstance(record["id"], str) or not isinstance(record["sample"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{file}, line {number}: no record of a response; accepted: a file that was not "
                "changed since, or remove it"
            ) from None
        yield record
