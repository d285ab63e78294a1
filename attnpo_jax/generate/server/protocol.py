"""What a call asks for: the bodies of `/v1/chat/completions` and `/v1/completions`, checked.

A field that is null counts as one that is not there. One that is not known here is refused, since
an answer that silently leaves out what was asked for would be a wrong one.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from attnpo_jax.config import rules
from attnpo_jax.data.chat_template import Conversation
from attnpo_jax.data.pair import BadExample, extra_fields
from attnpo_jax.data.prompts import Prompt, prompt_of
from attnpo_jax.generate.server.errors import ApiError
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling import requests as requests_lib
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.sampling.responses import MOST_TOP_LOGPROBS, Request
from attnpo_jax.sampling.rules import SETTINGS
from attnpo_jax.sampling.settings import SamplingSettings, SettingsError

# By field of a body, the setting that it is; the first three lists bound what a step costs.
_SETTINGS = {
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "logit_bias": "logit_bias",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "min_tokens": "min_new_tokens",
    "seed": "seed",
}
_MOST_ENTRIES = {"stop": 64, "stop_token_ids": 64, "logit_bias": 1024}
# Of OpenAI's, what says nothing of the answer.
_IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
_COMMON = {"model", "n", "stream", "stream_options", "max_tokens", "frequency_penalty", *_SETTINGS}
_CHAT = {
    "messages",
    "tools",
    "tool_choice",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "response_format",
}
_COMPLETIONS = {"prompt", "logprobs", "echo", "best_of", "suffix"}


@dataclasses.dataclass(frozen=True)
class Served:
    """What is served, and within which bounds.

    Attributes:
      name: what clients call the model.
      model: the model.
      settings: those that hold where a call says nothing.
      length: tokens of prompt and response together, at most.
      max_choices: responses that a call may ask for.
    """

    name: str
    model: SampledModel
    settings: Mapping[str, Any]
    length: int
    max_choices: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a call asks for.

    Attributes:
      is_chat: whether it is answered as a chat.
      requests: one a choice, in the order of the choices.
      logprobs: of how many likeliest tokens log-probs are wanted beside the sampled ones; None for
        no log-probs.
      stream: whether the answer comes in parts.
      with_usage: whether a last part tells of the tokens.
    """

    is_chat: bool
    requests: tuple[Request, ...]
    logprobs: int | None
    stream: bool
    with_usage: bool


def parse(body: Any, served: Served, *, is_chat: bool) -> Asked:
    """Reads the JSON value of a body.

    Raises:
      ApiError: it asks for what is not accepted.
    """
    if not isinstance(body, dict):
        raise ApiError("the body is not a JSON object; accepted: an object with `model`")
    body = {key: value for key, value in body.items() if value is not None}
    known = _COMMON | (_CHAT if is_chat else _COMPLETIONS)
    for key in body:
        if key not in known | _IGNORED:
            raise ApiError(
                f"{key[:60]!r} is not known here; accepted: {', '.join(sorted(known))}",
                param=key,
                code="unknown_parameter",
            )
    name = _value(body, "model", rules.text(), None)
    if name != served.name:
        told = "`model` is missing" if name is None else f"there is no model {name!r}"
        raise ApiError(
            f"{told}; accepted: {served.name!r}", status=404, param="model", code="model_not_found"
        )
    _refuse_others(body)
    stream = _value(body, "stream", rules.boolean(), False)
    prompts, param = _prompts(body, served, is_chat), "messages" if is_chat else "prompt"
    number = _value(body, "n", rules.integer(1, served.max_choices), 1)
    if number * len(prompts) > served.max_choices:
        raise ApiError(
            f"`{param}`: {len(prompts)} prompts times n = {number}; accepted: "
            f"{served.max_choices} responses a call",
            param=param,
        )
    logprobs = _logprobs(body, is_chat)
    settings = _settings(body, served)
    requests = []
    for tokens in prompts:
        fitted = _fitted(body, settings, len(tokens), served.length, param)
        for _ in range(number):
            # The draws depend on the seed and on a choice's place alone.
            asked = "call", tokens, fitted, len(requests), served.model.stop_tokens, logprobs or 0
            requests.append(Request(*asked))
    with_usage = _with_usage(body, stream)
    return Asked(is_chat, tuple(requests), logprobs, stream, with_usage)


def _value(body: Mapping[str, Any], key: str, rule: rules.Rule, default: Any) -> Any:
    if key not in body:
        return default
    if not rule.accepts(body[key]):
        raise _refused(key, body[key], rule.accepted)
    return body[key]


def _refused(key: str, value: Any, accepted: str) -> ApiError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return ApiError(f"`{key}` is {shown}; accepted: {accepted}", param=key)


def _refuse_others(body: Mapping[str, Any]) -> None:
    """Refuses what OpenAI's service has and this one has not, save where it asks for nothing."""
    only = {
        "frequency_penalty": (0, "0 (presence_penalty and repetition_penalty are there)"),
        "echo": (False, "false (prompts are not scored here)"),
        "suffix": ("", "none"),
        "response_format": ({"type": "text"}, '{"type": "text"}'),
        "best_of": (body.get("n", 1), "the same as `n`"),
    }
    for key, (value, accepted) in only.items():
        if key in body and body[key] != value:
            raise _refused(key, body[key], accepted)


def _with_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options", {})
    known = isinstance(options, dict) and set(options) <= {"include_usage", "include_obfuscation"}
    if not known or not isinstance(options.get("include_usage", False), bool):
        accepted = '{"include_usage": true} or {"include_usage": false}'
        raise _refused("stream_options", options, accepted)
    if "stream_options" in body and not stream:
        raise ApiError("`stream_options` is for `stream`: true alone", param="stream_options")
    return options.get("include_usage", False)


def _logprobs(body: Mapping[str, Any], is_chat: bool) -> int | None:
    top = rules.integer(0, MOST_TOP_LOGPROBS)
    if not is_chat:
        return _value(body, "logprobs", top, None)
    wanted = _value(body, "logprobs", rules.boolean(), False)
    number = _value(body, "top_logprobs", top, None)
    if number is not None and not wanted:
        raise ApiError("`top_logprobs` is for `logprobs`: true alone", param="top_logprobs")
    return (number or 0) if wanted else None


def _settings(body: Mapping[str, Any], served: Served) -> SamplingSettings:
    """What is in force, but for the response's length."""
    given: dict[str, Any] = {}
    for key, name in _SETTINGS.items():
        if key not in body:
            continue
        accepts, accepted = SETTINGS[name]
        value = [body[key]] if key == "stop" and isinstance(body[key], str) else body[key]
        try:
            value = rules.as_sampling(name, value)
        except ValueError:  # of a token id with thousands of digits
            raise _refused(key, body[key], accepted) from None
        if not accepts(value):
            raise _refused(key, body[key], accepted)
        most = _MOST_ENTRIES.get(key)
        if most is not None and len(value) > most:
            raise ApiError(f"`{key}` has {len(value)} entries; accepted: {most}", param=key)
        given[name] = value
    given.setdefault("seed", secrets.randbits(63))
    try:
        return served.model.settings(**served.settings | given | _lengths(body))
    except SettingsError as error:
        raise ApiError(str(error), param="min_tokens") from error


def _lengths(body: Mapping[str, Any]) -> dict[str, int]:
    """`max_new_tokens`, where the call says something of it."""
    said = {key: body[key] for key in ("max_completion_tokens", "max_tokens") if key in body}
    for key, value in said.items():
        accepts, accepted = SETTINGS["max_new_tokens"]
        if not accepts(value):
            raise _refused(key, value, accepted)
    if len(set(said.values())) > 1:
        raise ApiError(
            "`max_tokens` and `max_completion_tokens` differ; accepted: one of them",
            param="max_tokens",
        )
    return {"max_new_tokens": next(iter(said.values()))} if said else {}


def _fitted(
    body: Mapping[str, Any], settings: SamplingSettings, prompt: int, length: int, param: str
) -> SamplingSettings:
    """The settings for a prompt of so many tokens; what was not asked for in so many words ends
    where there is no more room.
    """
    room = length - prompt
    code = "context_length_exceeded"
    if room < 1:
        raise ApiError(
            f"`{param}` has {prompt} tokens, and there is room for {length} with the response",
            param=param,
            code=code,
        )
    said = next((key for key in ("max_completion_tokens", "max_tokens") if key in body), None)
    if said is not None and body[said] > room:
        raise ApiError(
            f"`{said}` is {body[said]}, and the prompt's {prompt} tokens leave room for {room} of "
            f"{length}",
            param=said,
            code=code,
        )
    if settings.min_new_tokens > room:
        raise ApiError(
            f"`min_tokens` is {settings.min_new_tokens}, and there is room for {room}",
            param="min_tokens",
            code=code,
        )
    return dataclasses.replace(settings, max_new_tokens=min(settings.max_new_tokens, room))


# --- Prompts --------------------------------------------------------------------------------------


def _prompts(body: Mapping[str, Any], served: Served, is_chat: bool) -> list[np.ndarray]:
    """The prompts' tokens, int32, at least one prompt of at least one token."""
    if is_chat:
        return [_chat_prompt(body, served)]
    given = body.get("prompt")
    accepted = "a text, token ids, or a list of these; none of them empty"
    if isinstance(given, str) or (isinstance(given, list) and given and _is_id(given[0])):
        given = [given]
    if not isinstance(given, list) or not given:
        raise _refused("prompt", given, accepted)
    if len(given) > served.max_choices:
        raise ApiError(
            f"`prompt` holds {len(given)} prompts; accepted: {served.max_choices}", param="prompt"
        )
    tokenizer = served.model.model.tokenizer.tokenizer.backend_tokenizer
    vocabulary = served.model.model.config.vocab_size
    prompts = []
    for one in given:
        if isinstance(one, str):
            _check_unicode(one, "prompt")
            # With what the tokenizer puts before a text; marks that it spells are marks.
            one = tokenizer.encode(one, add_special_tokens=True).ids
        if not isinstance(one, list) or not one or not all(map(_is_id, one)):
            raise _refused("prompt", given, accepted)
        outside = next((token for token in one if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise ApiError(
                f"`prompt` holds the token {outside}; accepted: 0 to {vocabulary - 1}",
                param="prompt",
            )
        prompts.append(np.asarray(one, np.int32))
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(f"`{param}` is not Unicode ({error.reason})", param=param) from None


def _chat_prompt(body: Mapping[str, Any], served: Served) -> np.ndarray:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _refused("messages", messages, "a list of messages, at least one")
    choice = _value(body, "tool_choice", rules.one_of("none", "auto"), "auto")
    tools = body.get("tools", []) if choice != "none" else []
    try:
        row = {"prompt": [_as_here(message) for message in messages], "tools": tools}
        prompt = prompt_of(row, "call")
        _check_written(served.model, prompt)
        return requests_lib.encode(served.model, prompt)
    except UserError as error:
        reason = error.reason if isinstance(error, BadExample) else str(error)
        param = "tools" if "`tools`" in reason else "messages"
        reason = reason.replace("`prompt`", "`messages`").replace(" of the prompt", "")
        raise ApiError(reason, param=param) from error


def _as_here(message: Any) -> Any:
    """A message with the names that templates know, and the arguments of calls as objects."""
    if not isinstance(message, dict):
        return message
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("role") == "developer":
        message["role"] = "system"
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["tool_calls"] = [_with_arguments(call) for call in calls]
    return message


def _with_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    if not isinstance(parsed, dict):
        return call
    return call | {"function": function | {"arguments": parsed}}


def _check_written(sampled: SampledModel, prompt: Prompt) -> None:
    """Raises BadExample where the template leaves out tools, or what a message holds."""
    template = sampled.model.tokenizer.template
    conversation = Conversation(prompt.messages, prompt.tools, generation_prompt=True)
    template.check_tools(conversation)
    held = [i for i, message in enumerate(prompt.messages) if extra_fields(message)]
    template.check_fields(conversation, {i: f"message {i + 1}" for i in held})
