"""The judge's pass over a probe's pairs, all layers, and the reference's; to disk, by shards."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from attnpo_jax.data.cache_key import cache_key
from attnpo_jax.data.manifest import features, groups, with_groups
from attnpo_jax.data.pair import SIDES, BadExample, Pair
from attnpo_jax.data.prepared import Prepared, status
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.data.tokenize import tokenize_pair
from attnpo_jax.data.vocabulary import check_ids
from attnpo_jax.judge.judge import Judge
from attnpo_jax.models.attention import implementations
from attnpo_jax.parallel import preemption
from attnpo_jax.prepare.pair_forms import PairForms
from attnpo_jax.prepare.passes import judged_by
from attnpo_jax.prepare.reference import Reference
from attnpo_jax.prepare.stage import shard_rows
from attnpo_jax.probe.weights import head_groups
from attnpo_jax.runtime.errors import Preempted
from attnpo_jax.runtime.progress import CountProgress
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.weighting.sources import in_order

if TYPE_CHECKING:
    from attnpo_jax.run import Run

# Pairs that an interruption costs at most.
_ROWS_PER_SHARD = 40
# Row lengths that are compiled: with 8, as `judge.num_buckets` has it, compiling takes longer than
# it saves of 300 short pairs.
_BUCKETS = 4


def against_itself(pair: Pair) -> Pair:
    """The rejected response on both sides: what the judge sees if there is nothing to choose."""
    return dataclasses.replace(
        pair, chosen=pair.rejected, chosen_fields=pair.rejected_fields, numbers={}
    )


def _length(forms: PairForms) -> int:
    """How long the judge's row of a pair is, which has both orders and their beginning once."""
    return sum(map(len, forms.prompt.ids)) - forms.prompt.prefix_length


class Passes:
    """What a probe measures a model by.

    Args:
      run: whose config has the template, lengths, precision and batch sizes.
      sampled: the model.
      digest: tells the model from others.
    """

    def __init__(self, run: "Run", sampled: SampledModel, digest: str):
        config = self._config = run.config
        self.model, self._run, self._digest = sampled.model, run, digest
        shape = self.model.config
        self.layers = tuple(range(shape.num_layers))
        self.groups = head_groups(shape.num_heads, shape.num_kv_heads)
        heads = [f"{k}:{head}" for k in self.layers for of in self.groups for head in of]
        self.sources = in_order([*self.layers, *heads])
        self._backend = sampled.backend
        self._attention = implementations.choose(
            config.model.attention, shape, config.model.dtype, self._backend.devices
        ).implementation
        self._sizes = {
            "dtype": jnp.dtype(config.model.dtype),
            "batch_size": config.judge.batch_size,
            "token_budget": config.judge.token_budget,
            "num_buckets": min(config.judge.num_buckets, _BUCKETS),
            "backend": self._backend,
            "attention": self._attention,
        }
        self.settings = {
            "judge.template": config.judge.template,
            "judge.max_length": config.judge.max_length,
            "judge.max_answer_length": config.judge.max_answer_length,
            "model.dtype": config.model.dtype,
            "model.prepare_weights": config.model.prepare_weights,
        }
        self._judge = Judge(
            self.model,
            template=run.template,
            max_length=config.judge.max_length,
            max_answer_length=config.judge.max_answer_length,
            source_layers=self.sources,
            **self._sizes,
        )

    def forms(self, pair: Pair) -> PairForms:
        """A pair's tokens.

        Raises:
          BadExample: it doesn't fit the config's lengths.
          UserError: a token is beyond the model's vocabulary.
        """
        data = self._config.data
        lengths = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
        try:
            tokenized = tokenize_pair(self.model.tokenizer, pair, **lengths)
            prompt = self._judge.prompter.build(pair)
        except BadExample as error:
            raise BadExample.of(pair, error.reason) from error
        sequences = {part: getattr(tokenized, f"{part}_ids") for part in ("prompt", *SIDES)}
        sequences["judge prompt"] = np.concatenate(prompt.ids)
        vocabulary = self.model.config.vocab_size
        check_ids(self.model.tokenizer, vocabulary, sequences, f"pair {pair.id}")
        return PairForms(tokenized, prompt)

    def fill(
        self,
        title: str,
        forms: Sequence[PairForms],
        path: pathlib.Path,
        digest: str,
        wanted: Sequence[str] = ("judge", "reference_logps"),
    ) -> list[dict[str, Any]]:
        """Computes what is not there yet, and reads it: the pairs' rows, see `data.shards`.

        Those of like length are computed, and lie on disk, together.

        Args:
          title: of the progress bar.
          forms: the pairs.
          path: the folder.
          digest: of the pairs.
          wanted: columns, of `data.shards.GROUPS`: the judge's, and perhaps
            the reference's log-probs.

        Raises:
          PreparedMismatch: the folder holds what was computed with other settings.
          Preempted: SIGTERM or Ctrl-C came; finished shards stay.
        """
        components = with_groups(self._components(digest), wanted)
        ids = [one.tokenized.id for one in forms]
        if status(path, components) != "complete":
            by_length = sorted(forms, key=_length, reverse=True)
            sorted_ids = [one.tokenized.id for one in by_length]
            writer = PreparedWriter(path, components, len(forms), _ROWS_PER_SHARD, ids=sorted_ids)
            pending = writer.pending()
            if pending:
                self._compute(title, by_length, components, writer, pending)
            writer.finish({"pairs": len(forms)})
        rows = {row["id"]: row for row in Prepared.open(path)}
        return [rows[id] for id in ids]

    def _components(self, digest: str) -> dict[str, Any]:
        """What the figures depend on."""
        config, run = self._config, self._run
        return cache_key(
            model={
                "weights": self._digest,
                "config": self.model.config.facts(),
                "dtype": config.model.dtype,
                "param_dtype": config.model.param_dtype,
                "prepare_weights": config.model.prepare_weights,
            },
            tokenizer=self.model.tokenizer.digest(),
            judge={
                "template": run.template.digest(),
                "max_length": config.judge.max_length,
                "max_answer_length": config.judge.max_answer_length,
                "verdict": True,
            },
            sources="probe",
            pairs_digest=digest,
            lengths={
                "max_length": config.data.max_length,
                "max_prompt_length": config.data.max_prompt_length,
            },
            source_layers=self.sources,
            num_layers=self.model.config.num_layers,
        )

    def _compute(
        self,
        title: str,
        forms: Sequence[PairForms],
        components: dict[str, Any],
        writer: PreparedWriter,
        pending: Sequence[tuple[int, int, int]],
    ) -> None:
        self._judge.fit([one.prompt for one in forms])
        columns = [judged_by(self._judge)]
        if "reference_logps" in groups(components):
            sample = [one.tokenized for one in forms]
            chunk = self._config.model.logps_chunk
            reference = Reference(self.model, sample, chunk=chunk, **self._sizes)
            columns.append(lambda some: reference.run([one.tokenized for one in some]))
        kept = features(components)  # of whole responses, figures are not wanted
        total = sum(stop - start for _, start, stop in pending)
        bar = self._config.log.progress
        with (
            preemption.watch() as noticed,
            CountProgress(title, total, "pairs", bar=bar) as progress,
        ):
            for shard, start, stop in pending:
                rows = shard_rows(columns, forms[start:stop], progress, noticed)
                if rows is None or noticed():
                    raise Preempted(
                        f"told to stop: shards of {writer.path} that were finished stay; the same "
                        "command goes on from there"
                    )
                writer.write(shard, [{column: row[column] for column in kept} for row in rows])
