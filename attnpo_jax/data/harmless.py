"""Which of the columns that are not used may be left out: those that can't be part of what a model
is asked or answers.
"""

import datetime
import decimal
import functools
import numbers
import re
from collections.abc import Collection
from typing import Any

# What a column is about is the last word of its name, sides and numbers aside: `response_model` and
# `model_chosen` name models, `model_response` is a response.
_HEADS = frozenset(
    """
    id ids uid uuid guid hash sha sha256 md5 checksum key index idx row rows number num count counts
    length lengths len size token tokens turns round step stage batch group seed
    source sources origin origins dataset datasets corpus subset split file filename path url urls
    link license provider model models policy policies generator engine version method strategy
    date time datetime timestamp timestamps at created updated year
    language languages lang locale category categories class topic topics subject subjects domain
    domains task tasks type types kind tag tags label labels difficulty level status flag flags
    name names author authors annotator annotators annotation annotations labeler worker
    quality score scores rating ratings rank ranks reward rewards margin margins preference winner
    verdict judge judgement judgment evaluation evaluations rationale critique feedback comment
    comments failure failures flaw flaws confidence agreement probability probabilities
    temperature logprob logprobs logps perplexity toxicity moderation redacted metadata meta
    """.split()
)
_SIDES = {"chosen", "rejected"}
# Where princeton-nlp's UltraFeedback has all the responses of which two were taken.
_NAMES = {"all_generated_responses"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SCALARS = (
    numbers.Number,
    decimal.Decimal,
    datetime.date,
    datetime.time,
    datetime.timedelta,
)


@functools.lru_cache(maxsize=1024)
def is_harmless_name(name: str) -> bool:
    """Whether a column of this name may be left out, whatever it holds.

    >>> [is_harmless_name(name) for name in ("chosen_model", "createdAt", "context", "rejected_2")]
    [True, True, False, False]
    """
    words = [word.lower() for word in _WORD.findall(name)]
    words = [word for word in words if word not in _SIDES and not word.isdigit()]
    return name in _NAMES or bool(words and words[-1] in _HEADS)


def is_harmless(name: str, value: Any, texts: Collection[str]) -> bool:
    """Whether a column may be left out of an example.

    Numbers and dates may, and what is empty; a column by its name; and what only repeats the
    `texts` (stripped) that are used: a list of messages, or of responses that two of `texts` were
    taken from.
    """
    if is_harmless_name(name) or _is_number(value) or not value:
        return True
    if isinstance(value, str):
        return not value.strip() or value.strip() in texts
    if not texts or not isinstance(value, list):
        return False
    if all(isinstance(one, str) for one in value):
        return len({one.strip() for one in value} & {*texts}) >= 2
    contents = [_content(one) for one in value]
    return all(isinstance(text, str) and text.strip() in texts for text in contents)


def _content(message: Any) -> Any:
    if not isinstance(message, dict):
        return None
    return message.get("content", message.get("value"))


def _is_number(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(one is None or _is_number(one) for one in value)
    return isinstance(value, _SCALARS)
