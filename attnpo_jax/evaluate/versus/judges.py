"""Who says which of two answers is better: an endpoint, or a model on this machine."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from attnpo_jax.data.pair import BadExample, Pair
from attnpo_jax.data.vocabulary import check_ids
from attnpo_jax.evaluate.endpoint import Ask, Endpoint
from attnpo_jax.evaluate.versus.outcomes import letters_verdict
from attnpo_jax.judge.judge import SAMPLE, Judge
from attnpo_jax.judge.prompt import JudgePrompt, JudgeTemplate, conversation_text
from attnpo_jax.parallel import processes
from attnpo_jax.runtime.progress import CountProgress
from attnpo_jax.sampling.model import SampledModel

if TYPE_CHECKING:
    from attnpo_jax.run import Run

# A judge that puts marks around its letter, or words behind it, is still understood.
_MAX_TOKENS, _TOP_LOGPROBS = 16, 5


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What a judge says of one pair.

    Attributes:
      orders: by order, log p(letter of the chosen answer) - log p(other letter), the chosen answer
        at A in the first order; NaN where it can't be read.
      refused: why the pair was not judged; "" where it was.
    """

    orders: tuple[float, float]
    refused: str = ""


def ask_endpoint(
    endpoint: Endpoint, template: JudgeTemplate, pairs: Sequence[Pair]
) -> list[Verdicts]:
    """An endpoint's verdicts, from the log-probs of its letters, or from its text without them.

    Raises:
      UserError, Preempted, DryRun: see `Endpoint.ask`.
    """
    asks = []
    for pair in pairs:
        question = conversation_text(pair.prompt, pair.tools)
        answers = [text.strip() or " " for text in (pair.chosen, pair.rejected)]
        for order, (a, b) in enumerate((answers, answers[::-1])):
            values = {"question": question, "answer_a": a, "answer_b": b}
            message = {"role": "user", "content": template.fill(values)[0]}
            asks.append(
                Ask(
                    f"{pair.id}, order {order}",
                    (message,),
                    _MAX_TOKENS,
                    top_logprobs=_TOP_LOGPROBS,
                    needs_logprobs=False,
                )
            )
    answers = endpoint.ask(asks)
    read = [letters_verdict(answer.text, answer.top_logprobs) for answer in answers]
    return [Verdicts((first, -second)) for first, second in zip(read[::2], read[1::2], strict=True)]


def ask_model(run: "Run", sampled: SampledModel, pairs: Sequence[Pair]) -> list[Verdicts]:
    """A model's own verdicts, by the judge's pass; `config.judge` has its template and lengths.

    Pairs that can't be judged are refused. Of several processes that work on a model together, all
    call this.
    """
    config, model = run.config, sampled.model
    judge = Judge(
        model,
        template=run.template,
        max_length=config.judge.max_length,
        max_answer_length=config.judge.max_answer_length,
        dtype=jnp.dtype(config.model.dtype),
        batch_size=config.judge.batch_size,
        token_budget=config.judge.token_budget,
        num_buckets=config.judge.num_buckets,
        backend=sampled.backend,
        attention=config.model.attention,
    )
    built = [_built(judge, pair) for pair in pairs]
    found = [Verdicts((math.nan, math.nan), one if isinstance(one, str) else "") for one in built]
    places = [i for i, one in enumerate(built) if not isinstance(one, str)]
    if not places:
        return found
    prompts = [built[i] for i in places]
    for i in places:
        sequences = {"judge prompt": np.concatenate(built[i].ids)}
        check_ids(model.tokenizer, model.config.vocab_size, sequences, f"prompt {pairs[i].id}")
    judge.fit(prompts[:SAMPLE])
    bar = config.log.progress and processes.is_first()
    with CountProgress("judge", len(prompts), "pairs", bar=bar) as progress:
        for done in judge.verdicts(prompts):
            for k, verdict_2 in done:
                found[places[k]] = Verdicts(tuple(map(float, verdict_2)))
            progress.add(len(done))
    return found


def _built(judge: Judge, pair: Pair) -> JudgePrompt | str:
    """A pair's judge prompts, or why there are none."""
    try:
        return judge.prompter.build(pair)
    except BadExample as error:
        return error.reason
