"""Spans and alignment with the tokenizers of models that people train.

`tests/fetch_tokenizers.sh FOLDER` fetches them; $ATTNPO_TOKENIZERS names the folder, and without it
those are skipped that the package does not fetch itself. $ATTNPO_PAIRS may name a source of real
pairs to check beside the strings below.
"""

import functools
import os
import pathlib
import unicodedata

import numpy as np
import pytest

from attnpo_jax.data.align import align
from attnpo_jax.data.formats import Pair
from attnpo_jax.data.pair import BadExample, PrecomputedWeights
from attnpo_jax.data.precomputed_weights import WeightReader
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from attnpo_jax.judge.prompt import JudgePrompter, JudgeTemplate

# Llama 2's tokenizer comes without a chat template; this is the one of its chat models.
LLAMA2_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
EMPTY_BLOCK = "<think>\n\n</think>\n\n"
TEMPLATES = {"llama2": LLAMA2_TEMPLATE}

NASTY = [
    "a",
    "I",
    "0",
    "Plain text, of one sentence.",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈, 👍🏽, 🇩🇪🇯🇵",
    "😀😀😀",
    "e\u0301 n\u0303 a\u030a\u0302 — decomposed",
    "Z\u0351\u036b\u0343a\u0334\u0321\u035dl\u0322g\u0335o\u0338",
    "今天天气很好。我们去公园吧！",
    "東京タワー と ｶﾀｶﾅ と 한국어",
    "שלום עולם, مرحبا بالعالم ١٢٣",
    "हिन्दी में लिखा हुआ, ไทย, தமிழ்",
    "def f(x):\n\tif x:\n\t\treturn {'a': [1, 2]}\n\n\n\treturn None",
    "for (int i = 0;\ti < n;\ti++) {\r\n    sum += i;\r\n}",
    "line\n\n\n\nline\n \n  line",
    "a    b\t\tc \u00a0 d\u3000e",
    "zero\u200bwidth\u200djoin\ufeff mark\u00ad soft",
    "<|im_start|>assistant\nno<|im_end|>",
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi",
    "[INST] <<SYS>>x<</SYS>> [/INST] y </s><s>",
    "<start_of_turn>model\n<end_of_turn><bos><eos><pad><unk>",
    "<think>\n\n</think>\n\nBecause.",
    "<|The End of Answer A|>\n\n<|The Start of Answer B|>\nB",
    "{question} {answer_a} {{x}} {% if %}",
    "▁under ▁bar <0x0A> Ġword Ċ",
    "ﬁne ℌ𝔢𝔩𝔩𝔬 ①②③ ½ ™ Ⅷ",
    "\ufffd replacement \ufffd\ufffd",
    "\ue000 private \uf8ff use \U000f0000",
    "\x01\x02 control \x7f\x85 end",
    "x" * 300,
    "!?" * 100,
    "3.14159e-10 + 1,000,000 = $5.00",
    "https://a.example/b?c=d&e=%20#f",
    "\u2028separator\u2029paragraph",
    "ÀÉÎÕÜ ßçøæ ĳ Ǆ",
    "'s 've don't I'LL",
    ".",
    "...",
    ".\n.",
]


def nasty_pairs():
    pairs = []
    for i, chosen in enumerate(NASTY):
        rejected = NASTY[(i * 7 + 3) % len(NASTY)]
        for k, (before, after) in enumerate((("", ""), ("\n  ", " \n\n"))):
            prompt = ({"role": "user", "content": NASTY[(i + 1) % len(NASTY)]},)
            pairs.append(
                Pair(f"nasty-{i}-{k}", prompt, before + chosen + after, before + rejected + after)
            )
    return pairs


@pytest.fixture(scope="module")
def pairs():
    given = os.environ.get("ATTNPO_PAIRS")
    if not given:
        return nasty_pairs()
    loaded = load_pairs(given, on_bad_row="skip")
    # Nothing but what is no preference is left out.
    assert {row["reason"] for row in loaded.bad_rows} <= {"`chosen` equals `rejected`"}
    return nasty_pairs() + list(loaded.pairs)


@pytest.fixture(scope="module", params=["llama3", "llama2", "qwen3", "gemma3", "smollm2"])
def tokenizer_name(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(request, tokenizer_name):
    if tokenizer_name == "smollm2":
        return ChatTokenizer.load(request.getfixturevalue("smollm2_folder"))
    folder = os.environ.get("ATTNPO_TOKENIZERS")
    if not folder:
        pytest.skip("no $ATTNPO_TOKENIZERS (see tests/fetch_tokenizers.sh)")
    return ChatTokenizer.load(pathlib.Path(folder) / tokenizer_name, TEMPLATES.get(tokenizer_name))


@pytest.fixture(scope="module")
def trained_on(tokenizer, pairs):
    """Every pair with its tokens."""
    limits = {"max_length": 200_000, "max_prompt_length": 100_000}
    return [(pair, tokenize_pair(tokenizer, pair, **limits)) for pair in pairs]


def covered(spans):
    return sorted({place for start, end in spans.tolist() for place in range(start, end)})


def as_read_back(text):
    """What a tokenizer may make of text that it writes out again: it composes characters (NFC), and
    takes its own mark of a word's start for a space.
    """
    return unicodedata.normalize("NFC", text.replace("▁", " ")).strip()


def test_every_pair_is_aligned(tokenizer, trained_on):
    prompter = JudgePrompter(tokenizer, JudgeTemplate.load("default"), 100_000, 10_000)
    rng = np.random.default_rng(0)
    control = set(tokenizer.tokenizer.all_special_ids)
    same = tokens = 0
    for pair, trained in trained_on:
        judged = prompter.build(pair)
        for side in ("chosen", "rejected"):
            text = getattr(pair, side).strip()
            everything = list(range(len(text)))
            spans = getattr(trained, f"{side}_spans")
            ids = getattr(trained, f"{side}_ids")[: getattr(trained, f"{side}_text_length")]
            assert covered(spans) == everything, (pair.id, side)
            assert not control & set(ids.tolist()), (pair.id, side)
            decoded = tokenizer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            # Beside an answer that thinks, one that doesn't brings the template's empty block.
            decoded = decoded.removeprefix("" if text.startswith("<think>") else EMPTY_BLOCK)
            assert as_read_back(decoded) == as_read_back(text), (pair.id, side)
            for order in (0, 1):
                places = getattr(judged, f"{side}_tokens")[order]
                judge_spans = getattr(judged, f"{side}_spans")[order]
                judge_ids = judged.ids[order][places]
                assert covered(judge_spans) == everything, (pair.id, side)
                assert not control & set(judge_ids.tolist()), (pair.id, side)
                mass = rng.random(len(places))
                weights = align(mass, judge_spans, spans, judge_ids, ids)
                assert weights.min() >= 0
                np.testing.assert_allclose(weights.sum(), mass.sum(), rtol=1e-6, err_msg=pair.id)
                here, there = agreeing(judge_ids, judge_spans, ids, spans)
                np.testing.assert_array_equal(weights[there], mass[here], err_msg=pair.id)
                same += len(there)
                tokens += len(ids)
    # Mostly both are the same: what a template puts beside a response changes its ends. Of strings
    # made to be cut differently, fewer.
    assert same > (0.9 if os.environ.get("ATTNPO_PAIRS") else 0.7) * tokens


def test_precomputed_weights_of_vocabulary_entries_are_those_of_ids(tokenizer, trained_on):
    reader = WeightReader(tokenizer.tokenizer.backend_tokenizer, tokenizer.origin)
    rng = np.random.default_rng(1)
    for pair, trained in trained_on:
        ids, weights = {}, {}
        for side in ("chosen", "rejected"):
            length = getattr(trained, f"{side}_text_length")
            ids[side] = getattr(trained, f"{side}_ids")[:length]
            weights[side] = rng.random((1, length)).astype(np.float32)
        entries = {
            side: tuple(tokenizer.tokenizer.convert_ids_to_tokens(ids[side])) for side in ids
        }
        texts = pair.chosen, pair.rejected
        found = reader.carry(PrecomputedWeights(entries, weights), *texts, trained)
        # They are the tokens that are trained on; ASCII without spaces reads the same either way.
        for side, got in zip(weights, found, strict=True):
            np.testing.assert_allclose(got, weights[side], rtol=1e-6, err_msg=pair.id)


# --- The template's own parsing of answers --------------------------------------------------------

REASONING = [
    "</think>",
    "<think>a</think>b",
    "<think>\n\n</think>\n\nBecause.",
    "x </think> y",
    "a\n<think>b",
    "<think>",
    "</think>\n\nz",
    "\n\nafter lines",
    "<tool_response>a</tool_response>",
    "<|im_end|>\n<|im_start|>assistant\n</think>",
]
# What each template takes off an answer's ends.
TRIMS = {
    "llama3": str.strip,
    "llama2": str.strip,
    "gemma3": str.strip,
    "qwen3": lambda text: text.lstrip("\n"),
    "smollm2": lambda text: text,
}
BEFORE = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"})


def squeezed(text):
    """Without white space, which decoding writes where it likes."""
    return "".join(text.split())


@pytest.mark.parametrize("earlier", [(), BEFORE], ids=["first", "later"])
def test_answers_stand_as_the_template_writes_them(tokenizer, tokenizer_name, earlier):
    """Or are refused, where it takes them for reasoning and an answer."""
    prompter = JudgePrompter(tokenizer, JudgeTemplate.load("default"), 100_000, 10_000)
    apply = functools.partial(
        tokenizer.tokenizer.apply_chat_template, tokenize=False, enable_thinking=False
    )
    decode = functools.partial(tokenizer.tokenizer.decode, clean_up_tokenization_spaces=False)
    prompt = (*earlier, {"role": "user", "content": "Why?"})
    question = [{"role": "user", "content": "PLAIN"}]
    _, ending = apply(question, add_generation_prompt=True).split("PLAIN")
    refused = []
    for answer in REASONING:
        pair = Pair("p", prompt, answer, "No.")
        written = apply([*prompt, {"role": "assistant", "content": answer}])
        if tokenizer_name == "llama3":  # which opens the next turn always
            written = written.removesuffix(ending.removeprefix("<|eot_id|>"))
        try:
            trained = tokenize_pair(tokenizer, pair, max_length=9999, max_prompt_length=9999)
        except BadExample as bad:
            assert "does not write its text as it is" in bad.reason
            refused.append(answer)
            continue
        text = TRIMS[tokenizer_name](answer)
        decoded = decode(trained.chosen_ids[: trained.chosen_text_length])
        assert decoded.strip() == text.strip(), answer
        whole = decode(np.concatenate([trained.prompt_ids, trained.chosen_ids]))
        assert squeezed(whole) == squeezed(written), answer
        judged = prompter.build(Pair("p", question, answer, "No."))
        for order in (0, 1):
            asked = squeezed(decode(judged.ids[order]))
            assert asked.endswith(squeezed(ending)), answer
            assert asked.count(squeezed(ending)) == 1 + squeezed(answer).count(squeezed(ending))
            places = judged.chosen_tokens[order]
            assert answer.strip() in decode(judged.ids[order][places]), answer
    parsed = ["</think>", "<think>a</think>b", "x </think> y"]
    assert refused == (parsed if tokenizer_name == "qwen3" else [])


def agreeing(judge_ids, judge_spans, ids, spans):
    """Places on both sides of the tokens where the tokenizations agree: between two places of the
    text that no token straddles, both have the same ids for the same characters.
    """
    everything = np.concatenate([judge_spans, spans]).tolist()
    straddled = {place for start, end in everything for place in range(start + 1, end)}
    groups = []
    for side_ids, side_spans in ((judge_ids, judge_spans), (ids, spans)):
        by_start = {}
        for i, (token, (start, end)) in enumerate(
            zip(side_ids.tolist(), side_spans.tolist(), strict=True)
        ):
            while start in straddled:
                start -= 1
            by_start.setdefault(start, []).append((i, token, end))
        groups.append(by_start)
    found = [[], []]
    for start, judge_group in groups[0].items():
        group = groups[1].get(start, [])
        if [token[1:] for token in judge_group] == [token[1:] for token in group]:
            found[0] += [i for i, *_ in judge_group]
            found[1] += [i for i, *_ in group]
    return found
