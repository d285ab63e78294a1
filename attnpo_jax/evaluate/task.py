"""What an evaluation is given: the model at hand, the config, a place for its files, a judge."""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict
from rich.console import Console

from attnpo_jax.data.prompts import Prompt
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.evaluate.endpoint import Endpoint
from attnpo_jax.evaluate.evaluator import Evaluator
from attnpo_jax.evaluate.files import FOLDER
from attnpo_jax.generate import model as models
from attnpo_jax.generate.respond import respond
from attnpo_jax.models.io import hf_folder
from attnpo_jax.parallel import checkpoint as checkpoints
from attnpo_jax.runtime.errors import UsageError, UserError
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.sampling.settings import defaults_of

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

_ANSWERS = "judge.sqlite"


class Subject:
    """The model that is evaluated, loaded when it is first asked for.

    Args:
      run: whose config says how.
      which: see `generate.model.load`.
      name: what its files are called; None for the checkpoint's step, `base`, or its folder's name.
      sampled: the model, where it is loaded already.
      checkpoint: a trained model's step, and what its checkpoint says that it is of; None to look
        them up.
    """

    def __init__(
        self,
        run: "Run",
        which: str | None = None,
        name: str | None = None,
        sampled: SampledModel | None = None,
        checkpoint: tuple[int, Mapping[str, Any]] | None = None,
    ):
        self._run, self._sampled, self._given = run, sampled, sampled is not None
        self.which = which or (models.BASE if run.workdir is None else models.TRAINED)
        if models.is_trained(self.which):
            checkpoint = checkpoint or _checkpoint(run, self.which)
        self._checkpoint = checkpoint
        self.name = name or _name_of(self.which, checkpoint and checkpoint[0])

    @property
    def resolved(self) -> str:
        """See `resolved`."""
        return resolved(self._run, self.which, self._checkpoint)

    def sampled(self) -> SampledModel:
        """The model; raises as `generate.model.load` does."""
        if self._sampled is None:
            self._sampled = models.load(self._run, self.which)
        return self._sampled

    @functools.cached_property
    def digest(self) -> str:
        """See `digest_of`."""
        return digest_of(self._run, self.which, self._checkpoint)

    def release(self) -> None:
        """Forgets the parameters, so that there is room for another model's; not those given."""
        if not self._given:
            self._sampled = None
        self._run.drop_params()


def resolved(
    run: "Run", which: str, checkpoint: tuple[int, Mapping[str, Any]] | None = None
) -> str:
    """What a model is called wherever it is recorded: a trained one by its step, `trained@40`,
    however it was asked for.

    Args:
      which, checkpoint: see `Subject`.
    """
    if not models.is_trained(which):
        return which
    step, _ = checkpoint or _checkpoint(run, which)
    return f"{models.TRAINED}@{step}"


def digest_of(
    run: "Run", which: str, checkpoint: tuple[int, Mapping[str, Any]] | None = None
) -> str:
    """A sha256 (hex) that tells a model from others of its name, without loading it.

    It covers the step and identity of a checkpoint, or a folder's weights (see
    `hf_folder.weights_digest`), shape, tokenizer and chat template; and what the folder says of
    sampling. Of a samples file, the file.

    Args:
      which: see `generate.model.load`; or a samples file.
      checkpoint: see `Subject`.
    """
    path = pathlib.Path(which).expanduser()
    of_config = which == models.BASE or models.is_trained(which)
    if not of_config and path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    folder = hf_folder.resolve(run.config.model.source if of_config else which)
    facts: dict[str, Any] = {"sampling": defaults_of(folder)}
    if models.is_trained(which):
        facts["step"], facts["identity"] = checkpoint or _checkpoint(run, which)
    else:
        variables = run.config.model.chat_template_kwargs
        tokenizer = ChatTokenizer.load(folder, run.chat_template, variables)
        facts["weights"] = hf_folder.weights_digest(folder)
        facts["shape"] = hf_folder.load_config(folder).facts()
        facts["tokenizer"] = tokenizer.digest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def marked(sampled: SampledModel, digest: str) -> SampledModel:
    """The model under a name that tells it from others that were called the same, so that its
    samples are taken for no other's.
    """
    return dataclasses.replace(sampled, name=f"{sampled.name} ({digest[:12]})")


def _checkpoint(run: "Run", which: str) -> tuple[int, dict[str, Any]]:
    """The step of the checkpoint that `which` names, and what it is of."""
    found = run.workdir and checkpoints.newest_identity(
        run.checkpoint_folder, models.step_of(run, which)
    )
    if not found:
        where = "no workdir" if run.workdir is None else f"no checkpoint in {run.workdir}"
        raise UserError(f"--model={which}: {where}; accepted: base, or an HF folder or hub id")
    return found


def _name_of(which: str, step: int | None) -> str:
    if step is not None:
        return f"step-{step}"
    return re.sub(r"[^\w.+-]", "-", pathlib.PurePath(which).name) or models.BASE


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One evaluation of one model.

    Attributes:
      run: the run.
      evaluator: the evaluation.
      subject: the model; None where the evaluation looks at none.
      folder: where its files go, which is there; None where nothing is to be written.
      console: where more than figures may be shown.
      settings: what decides the figures, by field.
      label: what files are called in place of the model's name; None for that, and for the
        evaluation's where it looks at no model.
    """

    run: "Run"
    evaluator: Evaluator
    subject: Subject | None
    folder: pathlib.Path | None
    console: Console
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str | None = None

    @property
    def section(self) -> config_dict.ConfigDict:
        """The evaluation's own section of the config; empty if it has none."""
        return self.run.config.evaluate.get(self.evaluator.section) or config_dict.ConfigDict()

    @property
    def model(self) -> str:
        """What the model's files are called, or those of no model."""
        if self.subject is not None:
            return self.subject.name
        return self.label or self.evaluator.name

    def sampled(self) -> SampledModel:
        """The model with its parameters."""
        return self.subject.sampled()

    def judge(self) -> Endpoint | None:
        """The endpoint of `config.evaluate.judge`; None where there is none.

        Its answers are kept for all evaluations of the workdir together, or beside the evaluation's
        other files where there is no workdir. Of several processes, the first one asks.

        Raises:
          UserError: see `Endpoint.open`; there is no folder for its answers.
        """
        section = self.run.config.evaluate.judge
        if not section.base_url:
            return None
        folder = self.folder if self.run.workdir is None else self.run.workdir / FOLDER
        if folder is None:
            raise UsageError(
                f"evaluate {self.evaluator.name} needs --workdir=DIR or --out=DIR, for what the "
                "judge answers"
            )
        return Endpoint.open(section, folder / _ANSWERS, progress=self.run.config.log.progress)

    def responses(
        self,
        prompts: Sequence[Prompt],
        tag: str = "samples",
        *,
        samples: int | None = None,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """The model's responses to prompts, kept in `FOLDER/MODEL.TAG.jsonl`, and resumed.

        Args:
          prompts: what to answer.
          tag: of the file, where an evaluation has several.
          samples: responses to each; None: as `config.generate.samples` says.
          **settings: of sampling, over those of `config.generate`.

        Returns:
          Records of the samples file, in the order of the prompts. A prompt that the model can't
          answer has none; it is told of in the log.
        """
        path = self.folder / f"{self.model}.{tag}.jsonl"
        sampled = marked(self.sampled(), self.subject.digest)
        records, refused = respond(self.run, sampled, prompts, path, samples=samples, **settings)
        if refused:
            _LOG.warning(
                "%s: %d prompts are not answered, the first one %s: %s",
                path,
                len(refused),
                refused[0].id,
                refused[0].reason,
            )
        return records
