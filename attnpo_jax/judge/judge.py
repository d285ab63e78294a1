"""The judge pass: both orders of a pair in one row, and the attention that carries the verdict.

A row is `[prefix | order 0 | order 1]`: the two prompts share everything up to where the answers
begin, so that part runs once. What all prompts of a dataset begin with (the chat template's header
and the instruction) runs once for all of them, and its keys and values are reused.

Shapes: B rows, L row length, P length of that common beginning, S judge layers, T response tokens.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax.data.align import align
from attnpo_jax.data.packing import choose_buckets
from attnpo_jax.data.pair import SIDES, Pair
from attnpo_jax.data.tokenize import ChatTokenizer, TokenizedPair, tokenize_pair
from attnpo_jax.data.vocabulary import check_ids
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.judge.prompt import JudgePrompt, JudgePrompter, JudgeTemplate, common_beginning
from attnpo_jax.models import decoder, lm_head, placement, reading
from attnpo_jax.models.attention import implementations
from attnpo_jax.models.decoder import ModelConfig, Params, Past
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel.batches import Batches
from attnpo_jax.weighting.sources import ROLLOUT, Source, counted_from_0, head_of, layer_of

_LOG = logging.getLogger(__name__)

# How many prompts are looked at to find their common beginning and the row lengths to compile.
SAMPLE = 256


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the judge says of one pair.

    Attributes:
      id: the pair's id.
      chosen: float32 (2, S, T), raw attention by order, layer and text token of the chosen response
        as it is trained on.
      rejected: float32 (2, S, T'), the same for the rejected response.
      verdict: float32 (2,), by order, log p(letter of the chosen response) - log p(other letter);
        NaN from a judge that was not asked for it.
      answer_ids: int32 (2,), by order, the token that the judge would most likely answer with,
        which need not be a letter; -1 likewise.
      source_layers: what the S axis holds, as `weighting.sources` names it: layers, counted from
        0, single heads, rollout.
      num_layers: how many layers the judge has.
      chosen_whole, rejected_whole: float32 (2, S, 4), of the response as the judge read it,
        whatever training cuts off: the sum of its attention, that of its first token, how many
        tokens it has, and the place of its first one among those trained on, below 0 where that is
        cut off. None where not known.
    """

    id: str
    chosen: np.ndarray
    rejected: np.ndarray
    verdict: np.ndarray
    answer_ids: np.ndarray
    source_layers: tuple[Source, ...]
    num_layers: int
    chosen_whole: np.ndarray | None = None
    rejected_whole: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Row:
    """One pair's row on the host, without the common beginning of P tokens."""

    tokens: np.ndarray
    positions: np.ndarray
    branch: np.ndarray
    read: tuple[int, int]


class Judge:
    """Judges preference pairs with one model.

    Args:
      template: `default`, a file, or a template that is loaded.
      max_length: a judge prompt stays below this many tokens.
      max_answer_length: tokens that an answer keeps where the prompt would be longer.
      source_layers: what the attention is kept of: layers, heads as "23:4", "rollout".
      verdict: whether the answer is wanted too; without it, layers above the last of those do not
        run.
      batch_size: rows in a batch, at most.
      token_budget: tokens in a batch, at most (a longer row is a batch of its own).
      num_buckets: row lengths that are compiled for the sampled prompts, for one to four numbers of
        rows; longer rows than those add powers of two.
      backend: where to run; the model's parameters lie as it says. None for one device.
      attention: `auto`, or one of `models.attention.implementations.IMPLEMENTATIONS`.
      trained: the tokenizer of what is trained on; None for the model's own.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        trained: ChatTokenizer | None = None,
        template: str | JudgeTemplate = "default",
        max_length: int = 2048,
        max_answer_length: int = 768,
        source_layers: Sequence[Source] = (-1,),
        verdict: bool = True,
        dtype=jnp.float32,
        batch_size: int = 8,
        token_budget: int = 4096,
        num_buckets: int = 4,
        backend: backends.Backend | None = None,
        attention: str = "auto",
    ):
        shape = model.config
        checked = [_checked(source, shape.num_layers, shape.num_heads) for source in source_layers]
        self.source_layers = tuple(checked)
        _tell_memory(self.source_layers, shape, dtype, token_budget)
        if not isinstance(template, JudgeTemplate):
            template = JudgeTemplate.load(template)
        self.prompter = JudgePrompter(
            model.tokenizer, template, max_length, max_answer_length, trained
        )
        self._same_ids = trained is None or model.tokenizer.same_ids(trained)
        self.verdict = verdict
        self._model = model
        self._num_buckets = num_buckets
        self._common = np.zeros(0, np.int32)
        self._past: Past | None = None
        self._lengths: tuple[int, ...] = ()
        self._backend = backend or backends.one_device(model.config)
        self._batches = Batches(self._backend.row_shards, batch_size, token_budget)
        choice = implementations.choose(attention, model.config, dtype, self._backend.devices)
        if attention == "auto":
            _LOG.info("attention: %s", choice)
        self._static = {
            "config": model.config,
            "dtype": jnp.dtype(dtype),
            "attention": choice.implementation,
        }
        self._letters = self._backend.replicate(np.asarray(self.prompter.letter_ids, np.int32))
        self._pass = compile_pass(
            self._backend,
            attention_sources(self.source_layers),
            verdict=verdict,
            **self._static,
        )

    def fit(
        self, prompts: Sequence[JudgePrompt], *, row_lengths: Sequence[int] | None = None
    ) -> None:
        """Looks at a sample of the prompts to come, so as to judge them fast.

        Finds what all of them begin with and runs it once, and chooses the row lengths to compile.
        Results do not depend on it beyond rounding.

        Args:
          prompts: the sample, at least one.
          row_lengths: row lengths to compile, in place of those that suit the sample.
        """
        sequences = [ids for prompt in prompts for ids in prompt.ids]
        common = functools.reduce(common_beginning, sequences)
        common = common[: min(map(_sharable, prompts))]
        # Alone, a pair's orders share more than the template; running that apart gains nothing.
        self._common = common if len(prompts) > 1 else common[:0]
        self._past = None
        if len(self._common):
            make_past = self._backend.whole_pass(_shared_past, **self._static)
            self._past = make_past(self._model.params, self._common)
        lengths = [len(self._row(prompt).tokens) for prompt in prompts]
        self._lengths = tuple(row_lengths or choose_buckets(np.array(lengths), self._num_buckets))

    def judge(self, pairs: Sequence[Pair], tokenized: Sequence[TokenizedPair]) -> list[Judgement]:
        """Judges pairs, and carries the attention over to the tokens that are trained on.

        Raises UserError where a token is beyond the model's vocabulary.
        """
        prompts = [self.prompter.build(pair) for pair in pairs]
        for pair, prompt in zip(pairs, prompts, strict=True):
            sequences = {"judge prompt": np.concatenate(prompt.ids)}
            check_ids(
                self._model.tokenizer, self._model.config.vocab_size, sequences, f"pair {pair.id}"
            )
        if prompts and not self._lengths:
            self.fit(prompts[:SAMPLE])
        judgements: list[Judgement | None] = [None] * len(pairs)
        for done in self.run(prompts, tokenized):
            for i, judgement in done:
                judgements[i] = judgement
        return judgements

    def run(
        self, prompts: Sequence[JudgePrompt], tokenized: Sequence[TokenizedPair]
    ) -> Iterator[list[tuple[int, Judgement]]]:
        """Judges built prompts batch by batch, long ones first: yields (place, judgement) lists.

        The next batch is under way on the device while the last one's attention is carried over.
        """
        for batch, (rows_SBQL, verdict_BQ, answer_BQ) in self._outputs(prompts):
            done = []
            for b, i in enumerate(batch):
                pair, rows_SQL = tokenized[i], rows_SBQL[:, b]
                carried = [self._carried_over(rows_SQL, prompts[i], pair, side) for side in SIDES]
                attention, whole = zip(*carried, strict=True)
                says = (*attention, verdict_BQ[b], answer_BQ[b])
                of_model = self.source_layers, self._model.config.num_layers
                done.append((i, Judgement(pair.id, *says, *of_model, *whole)))
            yield done

    def verdicts(self, prompts: Sequence[JudgePrompt]) -> Iterator[list[tuple[int, np.ndarray]]]:
        """As `run`, of the verdicts alone: yields (place, float32 (2,)) lists."""
        for batch, (_, verdict_BQ, _) in self._outputs(prompts):
            yield [(i, verdict_BQ[b]) for b, i in enumerate(batch)]

    def _outputs(self, prompts: Sequence[JudgePrompt]) -> Iterator[tuple[list[int], tuple]]:
        """Yields which prompts, and what the pass gives for them, and for rows of padding."""
        rows = [self._row(prompt) for prompt in prompts]
        lengths = np.array([len(row.tokens) for row in rows], int)
        # A prompt that does not begin as the sample did runs whole, without the shared past.
        shares = np.array([self._begins_common(prompt) for prompt in prompts], bool)

        def start(batch: np.ndarray, length: int, size: int):
            past = self._past if shares[batch[0]] else None
            arrays = _stack([rows[i] for i in batch], size, length)
            return self._pass((self._model.params, past, self._letters), arrays)

        groups = np.flatnonzero(shares), np.flatnonzero(~shares)
        for batch, output in self._batches.run(lengths, self._lengths, start, *groups):
            yield batch.tolist(), output

    def _begins_common(self, prompt: JudgePrompt) -> bool:
        n = len(self._common)
        return n > 0 and _sharable(prompt) >= n and np.array_equal(prompt.ids[0][:n], self._common)

    def _row(self, prompt: JudgePrompt) -> _Row:
        p, (first, second) = prompt.prefix_length, prompt.ids
        skip = len(self._common) if self._begins_common(prompt) else 0
        tokens = np.concatenate([first, second[p:]])
        positions = np.concatenate([np.arange(len(first)), np.arange(p, len(second))])
        branch = np.repeat([1, 2, 3], [p, len(first) - p, len(second) - p])
        read = (len(first) - 1 - skip, len(tokens) - 1 - skip)
        return _Row(tokens[skip:], positions[skip:], branch[skip:], read)

    def _carried_over(
        self, rows_SQL: np.ndarray, prompt: JudgePrompt, pair: TokenizedPair, side: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """A response's attention (2, S, T) by order, on its tokens as they are trained on, and the
        figures (2, S, 4) of all of it, see `Judgement`.
        """
        skip = len(self._common) if self._begins_common(prompt) else 0
        shift = len(prompt.ids[0]) - prompt.prefix_length
        cut_spans, spans = getattr(pair, f"{side}_cut_spans"), getattr(pair, f"{side}_spans")
        cut, spans = len(cut_spans), np.concatenate([cut_spans, spans])
        # White space before the text is trained on, and not judged.
        first = int((spans[:, 1] > spans[:, 0]).argmax()) - cut
        text_ids = getattr(pair, f"{side}_ids")[: getattr(pair, f"{side}_text_length")]
        judged = (getattr(prompt, f"{side}_{name}") for name in ("tokens", "spans"))
        orders, wholes = [], []
        for order, (at, its_spans, ids) in enumerate(zip(*judged, prompt.ids, strict=True)):
            # In the row, the second order's own tokens stand behind the first's.
            places = at - skip + order * shift * (at >= prompt.prefix_length)
            mass_ST = rows_SQL[:, order, places]
            # Those of tokens that were cut off are not known here; other tokenizers' mean nothing.
            both_ids = (ids[at], text_ids) if self._same_ids and not cut else ()
            orders.append(align(mass_ST, its_spans, spans, *both_ids)[:, cut:])
            counts = np.full((2, len(mass_ST)), [[len(places)], [first]])
            wholes.append(
                np.stack([mass_ST.sum(axis=-1), mass_ST[:, :1].sum(axis=-1), *counts], axis=-1)
            )
        return np.stack(orders).astype(np.float32), np.stack(wholes).astype(np.float32)


def _tell_memory(
    source_layers: Sequence[Source], shape: ModelConfig, dtype: Any, token_budget: int
) -> None:
    """Says what heads and rollout take, which is much."""
    if any(map(head_of, source_layers)):
        _LOG.info(
            "the judge's attention has %d layers and heads: %d bytes a text token, on disk and in "
            "training's batches",
            len(source_layers),
            2 * 4 * len(source_layers),
        )
    if ROLLOUT in source_layers:
        a_token = (shape.num_layers - 1) * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
        _LOG.info(
            "rollout keeps the queries and keys of all layers: %.0f MB for a batch of %d tokens "
            "(judge.token_budget), over all devices",
            a_token * jnp.dtype(dtype).itemsize * token_budget / 1e6,
            token_budget,
        )


def _sharable(prompt: JudgePrompt) -> int:
    """How many first tokens can run apart: those before the orders part and the answers begin.

    Answers that begin alike stay outside, since no attention is reported for what runs apart.
    """
    answers = (*prompt.chosen_tokens, *prompt.rejected_tokens)
    return min([prompt.prefix_length, *(int(tokens[0]) for tokens in answers if len(tokens))])


def _stack(rows: Sequence[_Row], size: int, length: int) -> tuple[np.ndarray, ...]:
    tokens, positions, branch = (np.zeros((size, length), np.int32) for _ in range(3))
    read = np.zeros((size, 2), np.int32)
    for b, row in enumerate(rows):
        n = len(row.tokens)
        tokens[b, :n], positions[b, :n], branch[b, :n] = row.tokens, row.positions, row.branch
        read[b] = row.read
    return tokens, positions, branch, read


def _shared_past(
    params: Params, tokens_P: jax.Array, *, config: ModelConfig, dtype, attention: str
) -> Past:
    return decoder.make_past(config, params, tokens_P, dtype=dtype, attention=attention)


def attention_sources(source_layers: Sequence[Source]) -> tuple[reading.Source, ...]:
    """Sources by name, counted from 0, as `models.reading` takes them."""
    return tuple(head_of(source) or source for source in source_layers)


def _checked(source: Source, num_layers: int, num_heads: int) -> Source:
    """A source of a model, counted from 0; raises IndexError where the model lacks it."""
    layer, head = layer_of(source), head_of(source)
    if layer is not None and not -num_layers <= layer < num_layers:
        raise IndexError(f"layer {source}: the model has {num_layers} layers")
    if head is not None and head[1] >= num_heads:
        raise IndexError(f"head {source}: the model's layers have {num_heads} heads")
    return counted_from_0(source, num_layers)


def compile_pass(
    backend: backends.Backend,
    sources: tuple[reading.Source, ...],
    *,
    verdict: bool = True,
    config: ModelConfig,
    dtype,
    attention: str,
) -> Callable:
    """The judge's pass over a batch of rows, as `Backend.row_pass` returns it.

    It takes (parameters, past or None, the two letters' ids) and (tokens, positions, branches, read
    positions), and returns attention rows, log-odds and top tokens; NaN and -1 for the latter if
    there is no `verdict`.
    """
    return backend.row_pass(
        _judge_rows,
        out_axes=(1, 0, 0),
        config=config,
        sources=sources,
        verdict=verdict,
        dtype=jnp.dtype(dtype),
        attention=attention,
    )


def _judge_rows(
    shared: tuple[Params, Past | None, jax.Array],
    rows: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    *,
    config: ModelConfig,
    sources: tuple[reading.Source, ...],
    verdict: bool = True,
    dtype,
    attention: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention rows (S, B, 2, L), the chosen letter's log-odds (B, 2) and the top token (B, 2).

    log p(A) - log p(B) is a difference of two logits. The head runs at the verdict positions alone.
    """
    params, past, letters = shared
    tokens_BL, positions_BL, branch_BL, read_B2 = rows
    output = reading.read(
        config,
        params,
        tokens_BL,
        positions_BL,
        branch_BL,
        read_B2,
        sources=sources,
        past=past,
        with_hidden=verdict,
        dtype=dtype,
        attention=attention,
    )
    if not verdict:
        shape = read_B2.shape
        return output.rows_SBQL, jnp.full(shape, jnp.nan), jnp.full(shape, -1, jnp.int32)
    hidden_BQD, unembedding_VD = placement.split_logits(
        output.hidden_BQD, decoder.unembedding(params).astype(dtype)
    )
    logits_BQV = lm_head.logits(hidden_BQD, unembedding_VD, softcap=config.final_logit_softcapping)
    # Sums, not indices: those would gather a vocabulary that is split over devices.
    tokens = jnp.arange(logits_BQV.shape[-1])
    a_BQ, b_BQ = (
        jnp.sum(jnp.where(tokens == letters[k], logits_BQV, 0.0), axis=-1) for k in (0, 1)
    )
    answer_BQ = jnp.argmax(logits_BQV, axis=-1).astype(jnp.int32)
    return output.rows_SBQL, (a_BQ - b_BQ) * jnp.array([1.0, -1.0]), answer_BQ


def judge_pairs(
    model: LanguageModel,
    pairs: Sequence[Pair],
    *,
    max_length: int = 2048,
    max_prompt_length: int = 1800,
    trained: ChatTokenizer | None = None,
    **settings,
) -> list[tuple[TokenizedPair, Judgement]]:
    """Tokenizes and judges pairs: the short way for a handful of them.

    The lengths are those of `data.tokenize.tokenize_pair`; `trained` is the tokenizer of another
    model to train; `settings` are arguments of `Judge`.
    """
    lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    tokenized = [tokenize_pair(trained or model.tokenizer, pair, **lengths) for pair in pairs]
    for pair in tokenized if trained is None else ():
        sequences = {part: getattr(pair, f"{part}_ids") for part in ("prompt", *SIDES)}
        check_ids(model.tokenizer, model.config.vocab_size, sequences, f"pair {pair.id}")
    judge = Judge(model, trained=trained, **settings)
    return list(zip(tokenized, judge.judge(pairs, tokenized), strict=True))
