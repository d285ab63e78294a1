"""Who reads a run's pairs beside the model that training starts from: a judge, scorers."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnpo_jax import config as config_lib
from attnpo_jax import scorers as functions
from attnpo_jax.config.scoring import Scorer
from attnpo_jax.data.chat_template import announce
from attnpo_jax.data.manifest import canonical
from attnpo_jax.data.pair import Pair
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.io.model_source import ModelSource
from attnpo_jax.prepare.pair_forms import PairForms
from attnpo_jax.prepare.scorer_forms import NotRead, Prefix, ScorerTokenizer
from attnpo_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from attnpo_jax.run import Run


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """A model with a tokenizer and a chat template of its own; looked up when it is asked for.

    Attributes:
      run: the run.
      field: the section of the config, or the dict, that names it: for messages.
      source: as `model.source` of a config; None for the model that training starts from.
      adapter: a PEFT folder of adapters on it; None for none.
      template, variables: `chat_template` and `chat_template_kwargs` of that section.
    """

    run: "Run"
    field: str
    source: str | None
    adapter: str | None = None
    template: str | None = None
    variables: Mapping[str, Any] | None = None

    @functools.cached_property
    def model(self) -> ModelSource | None:
        """Whose parameters it has; None for those that training starts from, without adapters."""
        start = self.run.config.model.source
        if self.adapter is None and self.source in (None, start):
            return None
        key = "source" if self.field == "judge" else "model"
        field = "model.source" if self.source is None else f"{self.field}.{key}"
        fetched = self.run.workdir is not None
        adapter = None if self.adapter is None else (self.adapter, f"{self.field}.adapter")
        return ModelSource(self.source or start, field, fetched, adapter)

    @property
    def shape(self) -> ModelConfig:
        """Its model's shape."""
        return self.run.model if self.model is None else self.model.shape

    @functools.cached_property
    def tokenizer(self) -> ChatTokenizer:
        """Its tokenizer, with the chat template in use."""
        config, run = self.run.config, self.run
        own = self.source not in (None, config.model.source)
        if not own and self.template is None and self.variables is None:
            return run.tokenizer
        text, variables = None if own else run.chat_template, self.variables
        if self.template is not None:
            text = pathlib.Path(self.template).read_text(encoding="utf-8")
        if not own and variables is None:
            variables = config.model.chat_template_kwargs
        folder = run.model_folder if self.model is None else self.model.folder
        try:
            return ChatTokenizer.load(folder, text, variables)
        except UserError as error:
            reason = str(error).replace("model.chat_template", f"{self.field}.chat_template")
            raise UserError(f"config.{self.field}: {reason}") from error

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What it is, as JSON: its model, and a digest of tokenizer and chat template."""
        model = {"weights": self.run.weights_digest, "config": self.run.model.facts()}
        if self.model is not None:
            model = self.model.identity
        return {"model": model, "tokenizer": self.tokenizer.digest()}


def judge(run: "Run") -> Reader | None:
    """The judge of a run; None for the model that training starts from, as it is trained."""
    section = run.config.judge
    own = section.chat_template is not None or section.chat_template_kwargs is not None
    if section.source in ("", run.config.model.source) and not own:
        return None
    template = {"template": section.chat_template, "variables": section.chat_template_kwargs}
    return Reader(run, "judge", section.source, **template)


@dataclasses.dataclass(frozen=True, eq=False)
class NamedScorer:
    """A scorer of a run.

    Attributes:
      run: the run.
      scorer: as the config has it.
      reader: the model that scores; None for a function.
    """

    run: "Run"
    scorer: Scorer
    reader: Reader | None

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What its numbers depend on, as JSON."""
        scorer = self.scorer
        if self.reader is None:
            name = scorer.function.func.__name__
            of = {"function": name, "hyperparameters": dict(scorer.hyperparameters)}
            return canonical(of | functions.identity(name))
        prefix = None
        if scorer.prefix is not None:
            prefix = {"text": scorer.prefix, "role": scorer.prefix_role}
        return canonical({**self.reader.identity, "prefix": prefix})

    @functools.cached_property
    def tokenizer(self) -> ScorerTokenizer:
        """What gives it the pairs as it reads them; of a model."""
        scorer, reader = self.scorer, self.reader
        prefix = None if scorer.prefix is None else Prefix(scorer.prefix, scorer.prefix_role)
        return ScorerTokenizer(
            scorer.name,
            reader.tokenizer,
            self.run.tokenizer,
            prefix=prefix,
            model=reader.shape,
            max_prompt_length=self.run.config.data.max_prompt_length,
            form=config_lib.trained_form(self.run.config),
        )


def scorers(run: "Run") -> dict[str, NamedScorer]:
    """The scorers of a run by name."""
    found = {}
    for scorer in config_lib.scorers(run.config):
        reader = None
        if scorer.function is None:
            template = {"template": scorer.chat_template, "variables": scorer.chat_template_kwargs}
            reader = Reader(run, scorer.field, scorer.model, scorer.adapter, **template)
        found[scorer.name] = NamedScorer(run, scorer, reader)
    return found


def not_read_by_scorers(
    run: "Run", pairs: Sequence[Pair], forms: Sequence[PairForms]
) -> list[NotRead]:
    """What scorers can't read of some pairs, each pair once.

    Args:
      pairs: the pairs, and perhaps others.
      forms: theirs.

    Raises:
      UserError: a token is beyond the vocabulary of a scorer's model.
    """
    by_id, found = {pair.id: pair for pair in pairs}, {}
    for scorer in run.scorers.values() if forms else ():
        if scorer.reader is None:
            continue
        announce(scorer.tokenizer.requests([by_id[form.tokenized.id] for form in forms]))
        for form in forms:
            try:
                scorer.tokenizer(by_id[form.tokenized.id], form.tokenized)
            except NotRead as error:
                found.setdefault(form.tokenized.id, error)
    return list(found.values())
