import dataclasses
import json
import pathlib

import hypothesis
import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from attnpo_jax.data import align as alignment
from attnpo_jax.data import sources
from attnpo_jax.data.chat_template import Conversation
from attnpo_jax.data.control_tokens import Piece
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from tests.tiny import CHATML

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"

CORPUS = [
    "The judge reads both answers and picks the better one.",
    "def main():\n\treturn 1\n\nassistant user system think",
    "naïve café, 今天天气很好, שלום עולם <b>bold</b>",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
# A space before the answer and one after, as in Llama 2's.
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# An empty thinking block before the answer, left out of the generation prompt; and what the text
# after "</think>" would be, if messages were parsed.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "trimming": TRIMMING, "spaced": SPACED, "thinking": THINKING}


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    # Markers that are not flagged special, and one that no template writes: ordinary vocabulary.
    tokenizer.add_tokens(["<think>", "</think>", "<b>"])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(set("▁<>/|_[]" + "abcdefghijklmnopqrstuvwxyzABINST.,"))
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "A"), ("▁", "B")]
    pieces += ["".join(merge) for merge in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    # Control tokens are pieces with the best score: as the model sees it, "</s>" is a word.
    scored = [(piece, 0.0) for piece in ("<unk>", *SPECIAL)]
    scored += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    scored += [(char, -5.0) for char in "▁<>/|_[]abcdefghijklmnopqrstuvwxyzABINST.,"]
    scored += [("▁the", -3.0), ("answer", -4.0), ("▁A", -3.0), ("▁B", -3.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


def word_level() -> tokenizers.Tokenizer:
    words = ["<unk>", *SPECIAL, "the", "answer", "user", "assistant", "A", "B", "<", ">", "|", "."]
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


BUILDERS = {f.__name__: f for f in (byte_level, byte_fallback, unigram, word_level)}


def wrap(backend: tokenizers.Tokenizer, chat_template: str | None) -> ChatTokenizer:
    unknown = "<unk>" if backend.token_to_id("<unk>") is not None else None
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token=unknown
    )
    fast.chat_template = chat_template
    return ChatTokenizer(fast, origin="test")


@pytest.fixture(scope="module")
def chat_tokenizers() -> dict[tuple[str, str], ChatTokenizer]:
    return {
        (kind, template): wrap(build(), TEMPLATES[template])
        for kind, build in BUILDERS.items()
        for template in TEMPLATES
    }


def pair(chosen: str, rejected: str = "No.", prompt: str = "Say it.") -> sources.Pair:
    return sources.Pair("p1", ({"role": "user", "content": prompt},), chosen, rejected)


def control_ids(tokenizer: ChatTokenizer) -> set[int]:
    backend = tokenizer.tokenizer.backend_tokenizer
    names = [*SPECIAL, *(n for n in ("<think>", "</think>") if n in tokenizer.chat_template)]
    return {backend.token_to_id(name) for name in names} - {None}


def long(tokenizer: ChatTokenizer, a_pair: sources.Pair):
    return tokenize_pair(tokenizer, a_pair, max_length=10_000, max_prompt_length=10_000)


def covered(spans: np.ndarray) -> list[int]:
    return sorted({char for start, end in spans.tolist() for char in range(start, end)})


CONVERSATION = [
    {"role": "user", "content": "the first answer"},
    {"role": "assistant", "content": "A, then\n\nB"},
    {"role": "user", "content": "  and  \n"},
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", BUILDERS)
def test_ordinary_text_is_rendered_and_encoded_as_transformers_does(
    chat_tokenizers, kind, template
):
    tokenizer = chat_tokenizers[kind, template]
    kwargs = {"add_generation_prompt": True, "enable_thinking": False}
    apply = tokenizer.tokenizer.apply_chat_template
    text = apply(CONVERSATION, tokenize=False, **kwargs)
    assert tokenizer.render(CONVERSATION, generation_prompt=True) == text
    expected = apply(CONVERSATION, tokenize=True, return_dict=False, **kwargs)
    asked = Conversation(tuple(CONVERSATION), generation_prompt=True)
    ids, offsets = tokenizer.encode_conversation(asked)
    assert ids.tolist() == expected
    assert tokenizer.encode(text) == (expected, [tuple(span) for span in offsets.tolist()])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", BUILDERS)
def test_text_never_becomes_a_control_token(chat_tokenizers, kind, template):
    tokenizer = chat_tokenizers[kind, template]
    control = control_ids(tokenizer)
    spelled = "</s> <|im_end|>\n<|im_start|>system <s>the<|im_end|>"
    # In the assistant's turn these are its own words.
    words = "<think> </think>"

    def found(asked: str, answered: str) -> list[int]:
        messages = (
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "A" + answered},
        )
        conversation = Conversation(messages)
        ids, offsets = tokenizer.encode_conversation(conversation)
        text = tokenizer.template.render(conversation)
        assert asked in text and answered in text
        assert offsets[:, 1].max() == len(text.rstrip()) or offsets[:, 1].max() == len(text)
        return [i for i in ids.tolist() if i in control]

    assert found(spelled + words, spelled) == found("the", "the") != []


def test_spelled_control_tokens_decode_to_the_text_again(chat_tokenizers):
    tokenizer = chat_tokenizers["byte_level", "thinking"]
    text = "He wrote <think>, then <|im_end|>."
    tokenized = long(tokenizer, pair(text, prompt=text))
    assert tokenizer.tokenizer.decode(tokenized.chosen_ids) == text + "<|im_end|>\n"
    length = tokenized.chosen_text_length
    assert tokenizer.tokenizer.decode(tokenized.chosen_ids[:length]) == text
    # Not flagged special, it is a token in what the assistant says, and text in what others say.
    tokens = tokenizer.tokenizer.convert_ids_to_tokens
    assert "<think>" in tokens(tokenized.chosen_ids)
    # The one in the prompt is that of the empty block before the answer.
    assert tokens(tokenized.prompt_ids).count("<think>") == 1
    assert "<|im_end|>" not in tokens(tokenized.chosen_ids[:length])
    assert "<b>" in tokens(long(tokenizer, pair("a<b>", prompt="c<b>")).chosen_ids)
    assert "<b>" in tokens(long(tokenizer, pair("a<b>", prompt="c<b>")).prompt_ids)


def test_spelling_a_control_token_leaves_the_rest_as_it_was(chat_tokenizers):
    # The word-start mark is put before the first text alone, aliases or not.
    tokenizer = chat_tokenizers["byte_fallback", "chatml"]
    tokens = tokenizer.tokenizer.convert_ids_to_tokens(
        long(tokenizer, pair("the </s>", prompt="</s> the")).prompt_ids
    )
    plain = tokenizer.tokenizer.convert_ids_to_tokens(
        long(tokenizer, pair("the", prompt="the")).prompt_ids
    )
    at = plain.index("<0x0A>") + 1
    assert plain[at] == "the"
    assert tokens == plain[:at] + ["<", "/", "s", ">", "▁the"] + plain[at + 1 :]


def test_unwritable_control_token_is_refused():
    backend = byte_level()
    backend.add_special_tokens(["→"])
    # Byte-level vocabulary can write the character, and does.
    ids = long(wrap(backend, CHATML), pair("a → b")).chosen_ids
    assert backend.token_to_id("→") not in ids
    assert backend.decode(ids.tolist(), skip_special_tokens=False) == "a → b<|im_end|>\n"
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "→": 1, "A": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<unk>", "→", "<s>", "</s>"])
    with pytest.raises(ValueError, match="'→' in a message can only be encoded as the control"):
        long(wrap(words, CHATML), pair("a → b"))


def test_response_is_its_own_tokens_then_the_closing(chat_tokenizers):
    tokenizer = chat_tokenizers["byte_level", "chatml"]
    tokenized = long(tokenizer, pair("The better one.", "no"))
    text_ids, spans = tokenizer.encode("The better one.")
    assert tokenized.chosen_ids.tolist() == text_ids + tokenizer.encode("<|im_end|>\n")[0]
    assert tokenized.chosen_text_length == len(text_ids)
    assert tokenized.chosen_spans.tolist() == [list(span) for span in spans]
    prompt = "<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenized.prompt_ids.tolist() == tokenizer.encode(prompt)[0]
    for field in dataclasses.fields(tokenized):
        value = getattr(tokenized, field.name)
        assert not isinstance(value, np.ndarray) or value.dtype == np.int32


def test_white_space_around_a_response_has_no_characters(chat_tokenizers):
    kept = long(chat_tokenizers["byte_level", "chatml"], pair(" \n one\n\n"))
    tokens = chat_tokenizers["byte_level", "chatml"].tokenizer.decode(
        kept.chosen_ids[: kept.chosen_text_length]
    )
    assert tokens == " \n one\n\n"
    assert kept.chosen_spans[0].tolist() == [0, 0]
    assert kept.chosen_spans[-1].tolist() == [3, 3]
    assert covered(kept.chosen_spans) == [0, 1, 2]
    # A template that trims has no such tokens.
    trimmed = long(chat_tokenizers["byte_level", "trimming"], pair(" \n one\n\n"))
    assert (
        trimmed.chosen_ids.tolist()
        == long(chat_tokenizers["byte_level", "chatml"], pair("one")).chosen_ids.tolist()
    )
    assert (trimmed.chosen_spans[:, 1] > trimmed.chosen_spans[:, 0]).all()


def test_template_that_trims_line_ends_alone(chat_tokenizers):
    tokenizer = chat_tokenizers["byte_level", "thinking"]
    tokenized = long(tokenizer, pair("\n\n \n x \n"))
    kept = tokenized.chosen_ids[: tokenized.chosen_text_length]
    assert tokenizer.tokenizer.decode(kept) == " \n x \n"
    assert covered(tokenized.chosen_spans) == [0]


def test_white_space_before_the_answer_belongs_to_the_response(chat_tokenizers):
    tokenizer = chat_tokenizers["byte_level", "spaced"]
    tokenized = long(tokenizer, pair("one"))
    decode = tokenizer.tokenizer.decode
    assert decode(tokenized.prompt_ids) == "<s>[INST] Say it. [/INST]"
    assert decode(tokenized.chosen_ids) == " one </s>"
    assert decode(tokenized.chosen_ids[: tokenized.chosen_text_length]) == " one"
    assert tokenized.chosen_spans[0, 0] == 0
    assert covered(tokenized.chosen_spans) == [0, 1, 2]


def test_thinking_block_belongs_to_the_prompt():
    # Also where the generation prompt lacks the block that every answer is given.
    without = THINKING.replace("enable_thinking is false", "enable_thinking is string")
    for template in (THINKING, without):
        tokenizer = wrap(byte_level(), template)
        tokenized = long(tokenizer, pair("one"))
        prompt = tokenizer.tokenizer.decode(tokenized.prompt_ids)
        assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert tokenizer.tokenizer.decode(tokenized.chosen_ids) == "one<|im_end|>\n"


def test_truncation_keeps_the_end_of_the_prompt_and_the_start_of_the_response(chat_tokenizers):
    tokenizer = chat_tokenizers["byte_level", "chatml"]
    a_pair = pair("The judge reads both answers.", "One.")
    whole = long(tokenizer, a_pair)
    cut = tokenize_pair(tokenizer, a_pair, max_length=11, max_prompt_length=7)
    assert cut.prompt_ids.tolist() == whole.prompt_ids[-7:].tolist()
    assert cut.chosen_ids.tolist() == whole.chosen_ids[:4].tolist()
    assert cut.chosen_text_length == 4
    assert cut.chosen_spans.tolist() == whole.chosen_spans[:4].tolist()
    assert cut.rejected_ids.tolist() == whole.rejected_ids[:4].tolist()
    flags = ("prompt_truncated", "chosen_truncated", "rejected_truncated")
    assert [getattr(whole, flag) for flag in flags] == [False] * 3
    assert [getattr(cut, flag) for flag in flags] == [True, True, True]
    # a closing token cut off, no text
    room = whole.rejected_text_length + 1
    cut = tokenize_pair(tokenizer, a_pair, max_length=7 + room, max_prompt_length=7)
    assert len(cut.rejected_ids) == room
    assert cut.rejected_text_length == whole.rejected_text_length


def test_response_left_with_no_token_is_refused(chat_tokenizers):
    tokenizer = chat_tokenizers["byte_level", "chatml"]
    with pytest.raises(ValueError, match="pair p1: the chosen response is left with no token.* 7 "):
        tokenize_pair(tokenizer, pair("one"), max_length=7, max_prompt_length=7)


def test_missing_chat_template_is_refused_and_can_be_given(tmp_path):
    with pytest.raises(ValueError, match="no chat template; give one in model.chat_template"):
        wrap(byte_level(), None)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(tmp_path)
    loaded = ChatTokenizer.load(tmp_path, chat_template=SPACED)
    messages = [{"role": "user", "content": "hi"}]
    assert loaded.render(messages, generation_prompt=True) == "<s>[INST] hi [/INST]"
    # The same files give the same digest, another template another one.
    assert loaded.digest() == ChatTokenizer.load(tmp_path, chat_template=SPACED).digest()
    assert loaded.digest() != ChatTokenizer.load(tmp_path, chat_template=CHATML).digest()
    digest = loaded.digest()
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][0]["lstrip"] = True
    file.write_text(json.dumps(content))
    assert ChatTokenizer.load(tmp_path, chat_template=SPACED).digest() != digest


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("m['content']", "m['content'] | upper"), "assistant message 0 times"),
        (
            CHATML.replace("m['content']", "m['content'] | replace(' ', '_')"),
            "does not write its text as it is: 'one and', but '<.im_start.>assistant.none_and<",
        ),
        (CHATML.replace("m['role']", "raise_exception('no ' + m['role'])"), "no user"),
        (CHATML.replace("m['content']", "''"), "last assistant message 0 times"),
        (CHATML.replace("m['content']", "m['content'] * 2"), "last assistant message 2 times"),
    ],
)
def test_templates_that_alter_messages_are_refused(template, reason):
    tokenizer = wrap(byte_level(), template)
    with pytest.raises(ValueError, match=reason):
        long(tokenizer, pair("one and"))


def test_dates_in_templates_stand_still():
    tokenizer = wrap(byte_level(), "\n{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.render(messages, generation_prompt=False)
    assert text == "\n26 Jul 2024\n<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.golden
def test_golden_responses_of_the_embedded_model(smollm2_folder):
    tokenizer = ChatTokenizer.load(smollm2_folder)
    closing = tokenizer.encode("<|im_end|>\n")[0]
    assert len(closing) == 2
    for line in (GOLDENS / "judge_weights.jsonl").read_text().splitlines():
        row = json.loads(line)
        a_pair = pair(row["chosen"][-1]["content"], row["rejected"][-1]["content"], row["prompt"])
        tokenized = tokenize_pair(tokenizer, a_pair, max_length=2048, max_prompt_length=1800)
        assert tokenized.chosen_ids.tolist() == row["chosen_tokens"] + closing
        assert tokenized.rejected_ids.tolist() == row["rejected_tokens"] + closing
        assert tokenized.chosen_text_length == len(row["chosen_tokens"])


@pytest.mark.golden
def test_golden_prompts_of_the_embedded_model(smollm2_folder):
    tokenizer = ChatTokenizer.load(smollm2_folder)
    for row in json.loads((GOLDENS / "smollm2_logits.json").read_text()):
        tokenized = long(tokenizer, pair("one", prompt=row["user"]))
        assert tokenized.prompt_ids.tolist() == row["input_ids"]


ODD_TEXT = st.lists(
    st.one_of(
        st.sampled_from(
            ["</s>", "<|im_end|>", "<|im_start|>", "<think>", "</think>", "<unk>", "[/INST]"]
            + [
                "👨‍👩‍👧",
                "🇫🇷",
                "e\u0301",
                "a\u0308\u0323",
                "今天",
                "שלום",
                "\t",
                "\n\n",
                "  ",
                "the",
                "A.",
            ]
            + ["\ue0000\ue001", "\ue002", "<0x41>", "▁"]
        ),
        st.text(st.characters(codec="utf-8"), max_size=4),
    ),
    min_size=1,
    max_size=8,
).map("".join)


@hypothesis.given(text=ODD_TEXT, kind=st.sampled_from(["byte_level", "byte_fallback", "unigram"]))
@pytest.mark.parametrize("template", TEMPLATES)
def test_any_text_is_covered_and_keeps_its_mass(chat_tokenizers, template, text, kind):
    tokenizer = chat_tokenizers[kind, template]
    stripped = text.strip()
    hypothesis.assume(stripped)
    try:
        tokenized = long(tokenizer, pair(text))
    except BadExample as bad:
        # The template takes the text for reasoning and an answer.
        assert "does not write its text as it is" in bad.reason and "</think>" in text
        return
    spans = tokenized.chosen_spans
    assert len(spans) == tokenized.chosen_text_length
    assert covered(spans) == list(range(len(stripped)))
    text_ids = set(tokenized.chosen_ids[: tokenized.chosen_text_length].tolist())
    assert not text_ids & control_ids(tokenizer) - tokenizer.emitted
    # The same response inside another text.
    pieces = [Piece("<|im_start|>"), Piece(f"x {stripped}\n", spelled=True), Piece("<|im_end|>")]
    _, offsets = tokenizer.encode_pieces(pieces)
    start = len("<|im_start|>x ")
    source = np.clip(offsets - start, 0, len(stripped))
    inside = source[(offsets[:, 1] > start) & (offsets[:, 0] < start + len(stripped))]
    mass = np.linspace(1, 2, len(inside))
    np.testing.assert_allclose(alignment.align(mass, inside, spans).sum(), mass.sum(), rtol=1e-12)
