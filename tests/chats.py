"""Chat templates of many kinds and tokenizers that join what a template and a user write; no models.

The tokenizers are of the kinds that checkpoints have: of bytes, split by the pattern of Qwen and Llama 3, in which a line
break belongs to the sign in front of it; and of words with the blank in front of them, as sentencepiece makes them. Their
merges are written down, because training breaks ties by chance.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from adafv.core import ImageLayout
from adafv.prompts.prompt import PlacedImage, Prompt, any_of
from adafv.prompts.text import ChatTemplate, text_columns

SPECIAL = ["<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
ENDS = ["</s>", "<|im_end|>", "<end_of_turn>"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'\"()[]#<>|/_-+=*\n"
JOINED = [
    "?\n",
    " Yes",
    " is",
    " the",
    " dog",
    "Is",
    "What",
    " user",
    "assistant",
    "ANT",
    ":\n",
    "..",
    ".\n",
    " (",
    "? ",
]
"""The longer tokens, each made by joining letters from the left."""

PARTS = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
)
IMAGES_FIRST = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} {% endif %}{% endfor %}"
)
BREAK = "{{ '\\n' }}"
"""Jinja drops a line break behind a tag."""
TEMPLATES = {
    "llava-1.5": (
        "{% for m in messages %}{{ m['role'].upper() }}: " + IMAGES_FIRST + "{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    # its marker ends in a blank, which the answer's first word takes
    "vicuna": (
        "{{ 'A chat between a curious human and an assistant. ' }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}USER: " + PARTS + " {% else %}ASSISTANT: " + PARTS + "</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    ),
    # a line break ends the user's words, and no role or token does
    "lines": (
        "{% for m in messages %}{% if m['role'] == 'user' %}USER: "
        + PARTS
        + BREAK
        + "{% else %}ASSISTANT: "
        + PARTS
        + BREAK
        + ""
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    ),
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # the answer to be written begins otherwise than one that was written
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    ),
    "gemma": (
        "<s>{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        + PARTS
        + "<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] " + PARTS + " [/INST]"
        "{% else %} " + PARTS + "</s>{% endif %}{% endfor %}"
    ),
    "tight": "{% for m in messages %}{% if m['role'] == 'user' %}[INST]" + PARTS + "[/INST]{% else %}" + PARTS + "</s>"
    "{% endif %}{% endfor %}",
    "hashes": (
        "{% for m in messages %}### {{ 'Human' if m['role'] == 'user' else 'Assistant' }}: "
        + PARTS
        + BREAK
        + "{% endfor %}"
        "{% if add_generation_prompt %}### Assistant:{% endif %}"
    ),
    "answer": (
        "{% for m in messages %}"
        + PARTS
        + "{% if m['role'] == 'user' %}"
        + BREAK
        + "Answer:{% else %}"
        + BREAK
        + "{% endif %}{% endfor %}"
    ),
    "question": (
        "{% for m in messages %}{% if m['role'] == 'user' %}Question: " + PARTS + " Answer:{% else %} " + PARTS + " "
        "{% endif %}{% endfor %}"
    ),
}


def _made(kind: str) -> Tokenizer:
    alphabet, joined = sorted(pre_tokenizers.ByteLevel.alphabet()), JOINED
    if kind == "words":
        alphabet = [*LETTERS, "▁", "é", "狗", *(f"<0x{number:02X}>" for number in range(256))]
        joined = [each.replace(" ", "▁") for each in JOINED]
    else:
        if kind == "anything":
            joined = [*JOINED, "?[", "e ASS", "R: W", "] Y", ": Y"]
        as_letters = pre_tokenizers.ByteLevel(False, use_regex=False)
        joined = [as_letters.pre_tokenize_str(each)[0][0] for each in joined]
    merges = dict.fromkeys((each[:end], each[end]) for each in joined for end in range(1, len(each)))
    vocabulary = dict.fromkeys([*SPECIAL, *alphabet, *("".join(pair) for pair in merges)])
    made = Tokenizer(
        models.BPE({token: n for n, token in enumerate(vocabulary)}, list(merges), byte_fallback=kind == "words")
    )
    if kind == "words":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
        )
        return made
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if kind == "bytes" else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    return made


TOKENIZERS = ("bytes", "words", "anything")
""""anything" joins whatever stands side by side often: words with markers, too."""


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=_made(kind),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
    )


@dataclass
class Processor:
    """As much of one as a chat needs."""

    tokenizer: PreTrainedTokenizerFast
    chat_template: str
    image_token: str = "<image>"

    def apply_chat_template(self, chat: Any, **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(chat, chat_template=self.chat_template, **options))


@functools.cache
def learned(kind: str, template: str) -> tuple[Processor, ChatTemplate]:
    processor = Processor(tokenizer(kind), TEMPLATES.get(template, template))
    return processor, ChatTemplate.of(processor)


IMAGE = None
"""In a chat below."""
Chat = Sequence[tuple[str, Sequence[str | None]]]
_OPEN, _SHUT = "\ue000", "\ue001"


@dataclass
class Written:
    """A chat as tokens, three for each image."""

    prompt: Prompt
    images: list[PlacedImage]
    parts: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """The columns that hold a letter of a part of a message, by the numbers of message and part: what is to be found."""

    def expected(self, *places: tuple[int, int]) -> list[int]:
        return sorted({column for place in places for column in self.parts[place]})


def write(kind: str, template: str, chat: Chat, generation: bool = True, padding: int = 0) -> Written:
    processor, _ = learned(kind, template)
    messages = [
        {
            "role": role,
            "content": [
                {"type": "image"} if p is IMAGE else {"type": "text", "text": _OPEN + p + _SHUT} for p in parts
            ],
        }
        for role, parts in chat
    ]
    marked = processor.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
    text, spans, start = "", [], 0
    for letter in marked:
        if letter == _OPEN:
            start = len(text)
        elif letter == _SHUT:
            spans.append((start, len(text)))
        else:
            text += letter
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, columns = [2] * padding, []
    for token in encoded.input_ids:
        columns.append(len(tokens))
        tokens += [token] * (3 if token == SPECIAL.index("<image>") else 1)
    blank = processor.tokenizer.convert_tokens_to_ids("▁")  # in front of a text it claims the first letter
    names = [(m, p) for m, (_, parts) in enumerate(chat) for p, part in enumerate(parts) if part is not IMAGE]
    parts = {
        name: [
            column
            for column, (first, last), token in zip(columns, encoded.offset_mapping, encoded.input_ids, strict=True)
            if token != blank and any(not text[at].isspace() for at in range(max(first, span[0]), min(last, span[1])))
        ]
        for name, span in zip(names, spans, strict=True)
    }
    ids = torch.tensor([tokens])
    visual = ids == SPECIAL.index("<image>")
    ends = any_of(ids, {SPECIAL.index("</s>" if template in ("llava-1.5", "vicuna") else end) for end in ENDS})
    prompt = Prompt(ids, ids != 2, {"image": visual}, ends, ends | any_of(ids, {0, 2}))
    places = visual[0].nonzero().flatten().split(3)
    layout = ImageLayout(torch.arange(3), crops=1, rows=1, columns=3)
    images = [PlacedImage("image", number, 0, place, layout) for number, place in enumerate(places) if len(place)]
    return Written(prompt, images, parts)


def found(kind: str, template: str, written: Written, image: int = 0, prompt: Prompt | None = None) -> list[int]:
    """The columns of the question of an image."""
    _, template_learned = learned(kind, template)
    columns: Tensor = text_columns(prompt or written.prompt, written.images[image], "question", template_learned)
    return list(columns.tolist())
