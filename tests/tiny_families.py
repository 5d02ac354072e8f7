"""What the files of real model families say: control tokens, chat templates, special ids; for `tiny_models`.

The templates are written anew, short, and true to what matters: Qwen3's is hybrid and keeps the thinking of the last
turn, DeepSeek's drops earlier thinking and opens the block itself, Llama's trims what is said.
"""

# ruff: noqa: RUF001  (DeepSeek's control tokens are spelled with a full-width bar)

from __future__ import annotations

from dataclasses import dataclass

QWEN3_TEMPLATE = """\
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thinking = '' %}
        {%- if message.reasoning_content is string %}{%- set thinking = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thinking = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or thinking) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

CHATML_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

DEEPSEEK_TEMPLATE = """\
{%- set ns = namespace(system='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{%- set ns.system = message['content'] %}{%- endif %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}{%- endif %}
    {%- if message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
        {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""

LLAMA_TEMPLATE = """\
{%- for message in messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim %}
    {%- if loop.first %}{{- bos_token }}{%- endif %}
    {{- content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MATHS = """\
Natalia sold 48 clips in April, and half as many in May. How many clips did she sell altogether?
Let $x$ be the number of apples. Then $3x + 5 = 20$, so $x = \\frac{15}{3} = 5$.
First, we compute the sum: $1 + 2 + \\dots + n = \\frac{n(n+1)}{2}$.\n\nSo the answer is $\\boxed{55}$.
Wait, let me check this again. If $a = 7$ then $a^2 = 49$, which is not even.
The probability that both dice show six is $\\frac{1}{6} \\cdot \\frac{1}{6} = \\frac{1}{36}$.
Therefore, the distance between the two points is $\\sqrt{(x_2 - x_1)^2 + (y_2 - y_1)^2}$.
Alternatively, note that $2^{10} = 1024$, hence $2^{20} \\equiv 76 \\pmod{100}$.
Each of the 12 boxes holds 9 pencils.\n\nSo there are 12 * 9 = 108 pencils in total.
Okay, so I need to find how many positive integers less than 100 are divisible by 3 or by 5.\n\nLet me think.
Please reason step by step, and put your final answer within \\boxed{}."""


@dataclass(frozen=True)
class Family:
    """What one family's files say; `control` are (text, special) of its added tokens, in the order of their ids."""

    template: str
    tokenizer_class: str
    control: tuple[tuple[str, bool], ...]
    bos: str | None
    eos: str
    pad: str
    ends: tuple[str, ...]
    digits: str = ""
    adds_bos: bool = False


IM = (("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True))
THINK = (("<think>", False), ("</think>", False))
QWEN3 = Family(
    QWEN3_TEMPLATE,
    "Qwen2Tokenizer",
    (*IM, *THINK),
    None,
    "<|im_end|>",
    "<|endoftext|>",
    ("<|im_end|>", "<|endoftext|>"),
)
DEEPSEEK_CONTROL = (
    ("<｜end▁of▁sentence｜>", True),
    ("<｜User｜>", False),
    ("<｜Assistant｜>", False),
    ("<｜begin▁of▁sentence｜>", True),
    *THINK,
)
FAMILY_FACTS = {
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3,
    "deepseek_qwen": Family(
        DEEPSEEK_TEMPLATE,
        "LlamaTokenizerFast",
        DEEPSEEK_CONTROL,
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜end▁of▁sentence｜>",),
        adds_bos=True,
    ),
    "llama": Family(
        LLAMA_TEMPLATE,
        "PreTrainedTokenizerFast",
        tuple(
            (f"<|{name}|>", True)
            for name in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
        ),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|end_of_text|>",
        ("<|end_of_text|>", "<|eot_id|>"),
        digits="{1,3}",
        adds_bos=True,
    ),
}
