"""Chat templates with the output formats of well-known model families, written for these tests.

`MARKS` are the control tokens of all of them; of these, `WORDS` are not flagged special.
"""

import json

import tokenizers
import transformers
from tokenizers import pre_tokenizers

MARKS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|User|>", "<|Assistant|>"),
)
WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>")

_CHATML_OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_CHATML = "<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n"
_LLAMA_OPEN = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_LLAMA = (
    "<s>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
_CALLS = (
    "{% for c in m['tool_calls'] %}{{ '\n' if m['content'] or not loop.first }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}"
)
_TOOLS = "{% for t in tools or [] %}{{ '\n' + (t | tojson) }}{% endfor %}"
_TOOL_TURN = "<|im_start|>user\n<tool_response>\n{{ m['content'] }}\n</tool_response><|im_end|>\n"

_LLAMA_TOOLS = (
    "<s>{% if tools %}<|start_header_id|>system<|end_header_id|>\n\nTools:"
    + _TOOLS
    + "<|eot_id|>{% endif %}{% for m in messages %}<|start_header_id|>"
    "{{ 'ipython' if m['role'] == 'tool' else m['role'] }}<|end_header_id|>\n\n"
    "{% if 'tool_calls' in m %}{{ m.tool_calls[0].function | tojson }}"
    "{% else %}{{ m['content'] | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}" + _LLAMA_OPEN + "{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ '<s>[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' </s>' }}{% endif %}{% endfor %}"
)
_MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'tool' %}[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %}{% if m.tool_calls %}[TOOL_CALLS]"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}</s>"
    "{% else %}{{ ' ' + m['content'] }}</s>{% endif %}"
    "{% else %}{{ raise_exception('only user, tool and assistant') }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "<s>{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ first if loop.first }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# No system block for an empty system message.
PHI = (
    "{% for m in messages %}{% if m['role'] != 'system' or m['content'] %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helper.<|im_end|>\n"
    "{% endif %}{% if tools %}<|im_start|>system\n# Tools"
    + _TOOLS
    + "<|im_end|>\n{% endif %}{% for m in messages %}{% if m['role'] == 'tool' %}"
    + _TOOL_TURN
    + "{% else %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}"
    + "{% if m['tool_calls'] %}"
    + _CALLS
    + "{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
    + _CHATML_OPEN
)
# Reasoning is parsed out of the content, left out of turns before the last question, and an empty
# block written in the last one.
_QWEN3 = (
    "{% if tools %}<|im_start|>system\n# Tools"
    + _TOOLS
    + "<|im_end|>\n{% endif %}{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}"
    + _TOOL_TURN
    + "{% elif m['role'] == 'assistant' %}{% set text = m['content'] %}{% set thought = '' %}"
    "{% if m.reasoning_content %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}"
    "{% else %}{{ text }}{% endif %}{% if m['tool_calls'] %}"
    + _CALLS
    + "{% endif %}<|im_end|>\n{% else %}"
    + _CHATML
    + "{% endif %}{% endfor %}"
    + _CHATML_OPEN[: -len("{% endif %}")]
    + "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# A flag in the system message, taken out of it, and a default for an empty one.
SMOLLM3 = (
    "{% set given = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% set mode = '/no_think' if '/no_think' in given else '/think' %}"
    "{% set given = given.replace('/no_think', '').replace('/think', '').rstrip() %}"
    "<|im_start|>system\nReasoning: {{ mode }}\n\n{{ given if given else 'You are a helper.' }}"
    "<|im_end|>\n{% for m in messages if m['role'] != 'system' %}"
    + _CHATML
    + "{% endfor %}"
    + _CHATML_OPEN
)
# The generation prompt opens a block that no turn of the conversation has.
_R1 = (
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %}<|Assistant|>"
    "{{ m['content'].split('</think>')[-1] }}</s>"
    "{% elif m['role'] == 'user' %}<|User|>{{ m['content'] }}{% else %}{{ m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
_VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + '</s>' }}"
    "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

FAMILIES = {
    "chatml": "{% for m in messages %}" + _CHATML + "{% endfor %}" + _CHATML_OPEN,
    "llama3": _LLAMA + "{% if add_generation_prompt %}" + _LLAMA_OPEN + "{% endif %}",
    "llama3-always-opens": _LLAMA + _LLAMA_OPEN.replace("\n", "{{ '\n' }}"),
    "llama3-tools": _LLAMA_TOOLS,
    "llama2": _LLAMA2,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "zephyr": _ZEPHYR,
    "phi": PHI,
    "qwen2.5": _QWEN25,
    "qwen3": _QWEN3,
    "smollm3": SMOLLM3,
    "r1": _R1,
    "vicuna": _VICUNA,
}
# What a family writes at the end of every conversation for the turn to come.
ALWAYS = {"llama3-always-opens": _LLAMA_OPEN}


def byte_level():
    """A tokenizer of bytes, that joins line ends and spaces to what follows, with all `MARKS`."""
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ġ", "T"), ("T", "h"), ("Th", "e"), (":", "Ġ"), (">", "Ċ")]
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(m) for m in merges]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({text: i for i, text in enumerate(vocabulary)}, merges)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return with_marks(backend)


def with_marks(backend):
    """A transformers tokenizer of a backend to which all `MARKS` and `WORDS` are added."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(json.loads(backend.to_str())))
    backend.add_special_tokens(list(MARKS))
    backend.add_tokens(list(WORDS))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
