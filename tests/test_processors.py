"""Stock processors of families other than LLaVA, real photos, the real command line: from a picture to an answer.

Those whose processors run without torchvision; the others (Qwen-VL, OneVision, InternVL) need it, and it is not
installed here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PATCH, finish
from processors import photo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from typer.testing import CliRunner

from adafv import AdaFV
from adafv.cli import app
from adafv.engines.transformers.prompt import place_images, read_prompt
from adafv.engines.transformers.text import resolve_scope, text_columns
from adafv.families import family_of

QUESTION = "What is the cat holding?"
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IDEFICS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'].capitalize() }}:{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer(special: list[str], **options: Any) -> PreTrainedTokenizerFast:
    """Bytes, and some special tokens in front."""
    names = ["<pad>", "<bos>", "<eos>", *special]
    vocabulary = {token: number for number, token in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        additional_special_tokens=special,
        **options,
    )


def vision(**options: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **options}


def text(vocabulary: int, **options: Any) -> dict[str, Any]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 12}
    return {"vocab_size": vocabulary, **sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **ids, **options}


def gemma() -> tuple[Any, Any]:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    special = ["<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>"]
    extra = {"boi_token": special[0], "eoi_token": special[1], "image_token": special[2]}
    made = tokenizer(special, extra_special_tokens=extra)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 8 * PATCH, "width": 8 * PATCH}),
        tokenizer=made,
        image_seq_length=16,
        chat_template=GEMMA_TEMPLATE,
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**vision(image_size=8 * PATCH, patch_size=PATCH, vision_use_head=False)),
        text_config=text(len(made), query_pre_attn_scalar=12, sliding_window=512),
        mm_tokens_per_image=16,
        boi_token_index=made.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=made.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=made.convert_tokens_to_ids("<image_soft_token>"),
    )
    return finish(Gemma3ForConditionalGeneration(config), 0, torch.float32), processor


def idefics() -> tuple[Any, Any]:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    places = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places]
    made = tokenizer(special)
    side = 4 * PATCH
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side}
        ),
        tokenizer=made,
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    config = Idefics3Config(
        vision_config=vision(image_size=side, patch_size=PATCH),
        text_config={"model_type": "llama", **text(len(made))},
        image_token_id=made.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return finish(Idefics3ForConditionalGeneration(config), 0, torch.float32), processor


MAKERS = {"gemma3": gemma, "idefics3": idefics}


@pytest.fixture(scope="module", params=MAKERS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return MAKERS[request.param]()


def conversation(images: int = 1) -> list[dict[str, Any]]:
    content = [*[{"type": "image"}] * images, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("size", [(100, 90), (90, 200), (300, 80), (40, 40)], ids=str)
@pytest.mark.parametrize("images", [1, 2])
def test_layouts_and_words_of_the_real_prompt(pair: tuple[Any, Any], size: tuple[int, int], images: int) -> None:
    model, processor = pair
    prompt = processor.apply_chat_template(conversation(images), add_generation_prompt=True)
    photos = [photo(number, *size) for number in range(images)]
    inputs = processor(images=[photos], text=[prompt], return_tensors="pt", add_special_tokens=False)
    family = family_of(model)
    read = read_prompt(model, family, inputs)
    layouts = family.layouts(model, "image", inputs, read.runs("image"))
    assert len(layouts) == images
    placed = place_images("image", read.placeholders["image"], layouts)
    scope, template = resolve_scope("question", processor)
    for image in placed:
        words = read.tokens[0, text_columns(read, image, scope, template)].tolist()
        assert processor.tokenizer.decode(words) == QUESTION.replace(" ", "")  # blanks are no words
    with AdaFV(keep=0.5, processor=processor)(model) as adafv:
        model.generate(**inputs, max_new_tokens=3)
    assert adafv.last.tokens_before == [layout.tokens for layout in layouts]


def test_the_command_line(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = pair
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    photo(3, 200, 150).save(tmp_path / "photo.png")
    asked = ["ask", str(tmp_path / "photo.png"), QUESTION, "--model", str(tmp_path / "model"), "--keep", "0.5"]
    result = CliRunner().invoke(app, [*asked, "--json", "--compare", "--picture", str(tmp_path / "kept.png")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    assert (tmp_path / "kept.png").stat().st_size > 1000
