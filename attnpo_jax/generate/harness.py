"""A model for lm-evaluation-harness: its tasks, on whatever is sampled from here.

    import lm_eval
    from attnpo_jax.generate.harness import HarnessModel

    lm_eval.simple_evaluate(HarnessModel(run), tasks=["arc_easy"])

Importing this module needs the extra `lm_eval`; it also registers the model there, as `attnpo`:

    lm_eval.simple_evaluate("attnpo", {"model": "smollm2-135m-instruct"}, tasks=["arc_easy"])

What is scored and sampled is what the harness's own class for transformers gives for the same
weights, up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from attnpo_jax.data.chat_template import Conversation
from attnpo_jax.data.pair import BadExample
from attnpo_jax.generate.api import engine_for, sampled_of
from attnpo_jax.judge.language_model import LanguageModel, load_model
from attnpo_jax.models import decoder, lm_head
from attnpo_jax.models.attention import implementations
from attnpo_jax.parallel import processes
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.sampling.responses import Request
from attnpo_jax.sampling.runner import row_length
from attnpo_jax.sampling.settings import SamplingSettings

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
except ImportError as error:
    raise UserError(
        f"evaluating with lm-evaluation-harness: {error}; pip install '.[lm_eval]' in a clone"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

# Of a task's `generation_kwargs`, those that are settings of the same name here.
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# A pass scores so many tokens at most, where it is more than one row.
_PASS_TOKENS = 8192
# Logits of so many tokens exist at a time.
_HEAD_TOKENS = 256

# A text to score: what the harness calls it, its context's tokens, and its own.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("attnpo")
class HarnessModel(TemplateLM):
    """A model as lm-evaluation-harness asks for it.

    Args:
      model: a loaded model, a run (whose trained model it is, if it has a workdir), what
        `generate.model.load` gives, or an HF folder, hub id, or `smollm2-135m-instruct`.
      batch_size: texts that are scored, and responses that are sampled, at a time.
      max_length: tokens of a text with its context, at most; what is before them is left out.
        None for the model's positions.
      max_gen_toks: tokens of a response, where a task does not say.
      seed: of the draws, in tasks that sample.
      config: how it computes, in place of the run's config or the default one.

    Raises:
      UserError: the model can't be loaded; there are several processes, each with a model of its
        own.
    """

    def __init__(
        self,
        model: str | LanguageModel | Run | SampledModel,
        *,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        config: Any = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size = {batch_size!r}; accepted: a whole number from 1 up")
        self._sampled, self._config = sampled_of(
            load_model(model) if isinstance(model, str) else model
        )
        self._config = config or self._config
        if processes.are_several() and not self._sampled.together:
            raise UserError(
                "lm-evaluation-harness runs in one process, or in several that hold one model "
                "together (prepare.devices = 'all')"
            )
        positions = self._sampled.model.config.positions
        self.batch_size = int(batch_size)
        self.max_length = min(max_length or positions, positions)
        self.max_gen_toks = max_gen_toks
        self._seed = seed
        self._chats = self._sampled.model.tokenizer
        self.tokenizer = self._chats.tokenizer
        self._score = _score_pass(self._sampled, self._config)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> HarnessModel:
        """As the harness makes one of its `--model_args`."""
        arguments = utils.simple_parse_args_string(arg_string)
        return cls.create_from_arg_obj(arguments, additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """As the harness makes one; of what it adds, the devices are JAX's to choose."""
        size = (additional_config or {}).get("batch_size")
        return cls(**({} if size is None else {"batch_size": size}) | arg_dict)

    # --- Tokens -----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        if not self._sampled.stop_tokens:
            raise UserError(f"{self._sampled.name}: no token ends a text")
        return self._sampled.stop_tokens[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context is scored after."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; with what the tokenizer puts before a text, unless it begins so already."""
        if add_special_tokens is None:
            begins = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = not begins
        backend = self.tokenizer.backend_tokenizer
        return backend.encode(string, add_special_tokens=add_special_tokens).ids

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer with its template, in the harness's caches."""
        return f"{self._chats.origin.replace('/', '__')}-{self._chats.digest()[:16]}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's template writes it; without its system message where the
        template refuses that.

        Args:
          add_generation_prompt: False where the last message, the assistant's, is gone on with.
        """
        goes_on = {} if add_generation_prompt else {"continue_final_message": True}

        def render(messages):
            conversation = Conversation(tuple(messages), (), add_generation_prompt)
            return self._chats.template.render(conversation, **goes_on)

        try:
            return render(chat_history)
        except BadExample:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            _LOG.warning("the chat template refuses a system message; it is left out")
            return render(without)

    # --- Scores -----------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-prob of each text, and whether each of its tokens is the likeliest one."""
        rows = []
        for _, context, text in requests:
            if len(text) > self.max_length:
                raise UserError(
                    f"a text to score has {len(text)} tokens; accepted: {self.max_length} "
                    "(max_length)"
                )
            # As for transformers' models: the last token is predicted and not read, and what does
            # not fit is cut off in front.
            tokens = [*context, *text][-(self.max_length + 1) :]
            rows.append((np.array(tokens, np.int32), len(text)))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        with tqdm(total=len(rows), disable=disable_tqdm, desc="log-likelihoods") as bar:
            while longest_first:
                length = row_length(len(rows[longest_first[0]][0]) - 1)
                size = self._rows_at_once(length)
                batch, longest_first = longest_first[:size], longest_first[size:]
                logps, greedy = self._score_rows([rows[i] for i in batch], length, size)
                for i, logp, is_greedy in zip(batch, logps, greedy, strict=True):
                    answers[i] = float(logp), bool(is_greedy)
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(batch))
        return answers

    def _rows_at_once(self, length: int) -> int:
        shards = self._sampled.backend.row_shards
        most = max(1, min(self.batch_size, _PASS_TOKENS // length))
        return -(-most // shards) * shards

    def _score_rows(
        self, rows: Sequence[tuple[np.ndarray, int]], length: int, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sums and whether all is greedy, of rows of tokens whose last ones are scored."""
        most = max(max(scored for _, scored in rows), 1)
        most = 1 << (most - 1).bit_length()  # few programs
        tokens_BL, length_B = np.zeros((size, length), np.int32), np.ones(size, np.int32)
        read_BM, target_BM = (np.zeros((size, most), np.int32) for _ in range(2))
        valid_BM = np.zeros((size, most), bool)
        for b, (tokens, scored) in enumerate(rows):
            read = len(tokens) - 1
            tokens_BL[b, :read], length_B[b] = tokens[:-1], read
            read_BM[b, :scored] = np.arange(read - scored, read)
            target_BM[b, :scored], valid_BM[b, :scored] = tokens[len(tokens) - scored :], True
        arrays = tokens_BL, length_B, read_BM, target_BM, valid_BM
        logps_B, greedy_B = jax.device_get(self._score(self._sampled.model.params, arrays))
        return logps_B[: len(rows)], greedy_B[: len(rows)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-prob of each whole text, in windows of `max_length` that overlap by one token."""
        windows: list[Scored] = []
        owners: list[int] = []
        for i, (text,) in enumerate(request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, scored in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, scored))
                owners.append(i)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (logp, _) in zip(owners, scores, strict=True):
            totals[i] += logp
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- Responses --------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A response to each context, up to a text that ends it, or a token that ends the model's.

        Raises:
          UserError: a task asks for settings that are not known, or for more tokens than fit.
        """
        asked = [self._request(i, *request.args) for i, request in enumerate(requests)]
        if not asked:
            return []
        most = max(len(one.tokens) + one.settings.max_new_tokens for one in asked)
        slots = min(self.batch_size, len(asked))
        engine = engine_for(self._sampled, self._config, length=most, slots=slots)
        texts = [""] * len(asked)
        with tqdm(total=len(asked), disable=disable_tqdm, desc="responses") as bar:
            for response in engine.run(asked):
                if response.finish_reason == "error":
                    raise UserError("the model's logits are no numbers (NaN or infinite)")
                i = int(response.id)
                texts[i] = response.text
                self.cache_hook.add_partial("generate_until", requests[i].args, response.text)
                bar.update()
        return texts

    def _request(self, i: int, context: str, given: dict[str, Any]) -> Request:
        kwargs = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        most, until = kwargs.pop("max_gen_toks"), kwargs.pop("until", None) or []
        is_drawn = kwargs.pop("do_sample", None)
        settings = {name: kwargs.pop(name) for name in _SETTINGS if name in kwargs}
        if not is_drawn:
            settings["temperature"] = 0
        if kwargs:
            accepted = ", ".join(("until", "do_sample", "max_gen_toks", *_SETTINGS))
            raise UserError(
                f"generation_kwargs of a task: {', '.join(kwargs)}; accepted: {accepted}"
            )
        room = self.max_length - most
        if room < 1:
            raise UserError(
                f"generation_kwargs of a task: {most} new tokens, and {self.max_length} positions "
                "for prompt and response; accepted: fewer new tokens"
            )
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        settings = SamplingSettings(**settings, max_new_tokens=most, stop=stop, seed=self._seed)
        tokens = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return Request(
            str(i), np.array(tokens, np.int32), settings, stop_tokens=self._sampled.stop_tokens
        )


def _score_pass(sampled: SampledModel, config: Any):
    """Compiles the pass that scores rows; see `_scores`."""
    dtype = jnp.dtype(config.model.dtype)
    model = sampled.model.config
    choice = implementations.choose(config.model.attention, model, dtype, sampled.backend.devices)
    return sampled.backend.row_pass(
        _scores, (0, 0), config=model, dtype=dtype, attention=choice.implementation
    )


def _scores(params, rows, *, config, dtype, attention):
    """Sums of log-probs float32 (B,), and whether all targets are the likeliest tokens, bool (B,).

    Shapes: B rows, L row length, M scored tokens a row; `read_BM` are the places that predict the
    targets.
    """
    tokens_BL, length_B, read_BM, target_BM, valid_BM = rows
    places = jnp.arange(tokens_BL.shape[1])
    branch_BL = (places < length_B[:, None]).astype(jnp.int32)
    positions_BL = jnp.broadcast_to(places, tokens_BL.shape)
    hidden_BLD = decoder.forward(
        config, params, tokens_BL, positions_BL, branch_BL, dtype=dtype, attention=attention
    )
    hidden_BMD = jnp.take_along_axis(hidden_BLD, read_BM[..., None], axis=1)
    unembedding_VD = decoder.unembedding(params)

    def of_some(chunk):
        hidden_BmD, target_Bm = chunk
        logits = lm_head.logits(hidden_BmD, unembedding_VD, softcap=config.final_logit_softcapping)
        picked = jnp.take_along_axis(logits, target_Bm[..., None], axis=-1)[..., 0]
        is_greedy = jnp.argmax(logits, axis=-1) == target_Bm
        return picked - jax.nn.logsumexp(logits, axis=-1), is_greedy

    B, M = target_BM.shape
    m = max(1, min(M, _HEAD_TOKENS // B))
    n = -(-M // m)
    chunks = tuple(
        jnp.pad(x, ((0, 0), (0, n * m - M), *((0, 0),) * (x.ndim - 2)))
        .reshape(B, n, m, *x.shape[2:])
        .swapaxes(0, 1)
        for x in (hidden_BMD, target_BM)
    )
    logps_BM, greedy_BM = (
        x.swapaxes(0, 1).reshape(B, n * m)[:, :M] for x in jax.lax.map(of_some, chunks)
    )
    total_B = jnp.sum(jnp.where(valid_BM, logps_BM, 0.0), axis=1)
    return total_B, jnp.all(greedy_BM | ~valid_BM, axis=1)
