"""The words of the small model: a closed vocabulary, one token a word, so that a word's embedding is the word's.

A WordPiece tokenizer of the stock kind, with "##s" for plurals. What it does not know becomes <unk>.
"""

from random import Random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adafv.evaluation.world.backgrounds import BACKGROUNDS
from adafv.evaluation.world.details import MARKS
from adafv.evaluation.world.objects import COLOURS, KINDS
from adafv.evaluation.world.questions import NUMBERS

SPECIAL = ("<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<image>")
PAD, UNKNOWN, END, USER, ASSISTANT, IMAGE = range(len(SPECIAL))

DESCRIBE = ("describe the picture.", "what is in the picture?")

_OTHER = (
    "a above an and are background below biggest color colour describe do faint how in is it large left leaves many of on "
    "object objects or picture right see small smallest the there what which yes no you ? . , ##s ##es"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}<end>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words() -> list[str]:
    """Every token, in the order of its id. Words for details came later and stand last: no other's id has changed."""
    known = {*KINDS, *COLOURS, *BACKGROUNDS, *NUMBERS, *_OTHER.split()}
    return [*SPECIAL, *sorted(known), *sorted({*MARKS, "has", "letter", "pattern"} - known)]


IDS = {word: number for number, word in enumerate(words())}
"""Token id of every word."""


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece(IDS, unk_token="<unk>", max_input_chars_per_word=40))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>", "<image>"],
        padding_side="left",
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def describe(random: Random) -> str:
    return random.choice(DESCRIBE)
