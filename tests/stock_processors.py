"""Stock processors for the small models of the test table: a photo and a question in, the model's inputs out.

One token per character, so that the vocabulary is as small as that of the models and every text is a real text. Where a
processor needs torchvision, its entry is there only if torchvision is: see `make processors`.
"""

import importlib.util
import string
from collections.abc import Callable
from typing import Any

from models import BEGIN, END, IMAGE, MARKERS, PAD, PATCH, SIDE, VIDEO, VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HAVE_TORCHVISION = importlib.util.find_spec("torchvision") is not None
LETTERS = [*string.ascii_letters, *string.digits, *":?.,<>|_-", "Ġ", "Ċ"]


def tokenizer(special: dict[int, str], **options: Any) -> PreTrainedTokenizerFast:
    """`special`: number -> name of a token besides beginning, end and padding."""
    names = {PAD: "<pad>", BEGIN: "<bos>", END: "<eos>", **special}
    letters = iter(LETTERS)
    vocabulary = {
        names[number] if number in names else next(letters, f"<unused{number}>"): number for number in range(VOCABULARY)
    }
    assert next(letters, None) is None, "more letters than the models have tokens for"
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        additional_special_tokens=list(special.values()),
        **options,
    )


def template(image: str, video: str = "", begin: str = "", end: str = "<eos>") -> str:
    """Every turn has a role in front of it and an end."""
    return (
        "{% for m in messages %}" + begin + "{{ m['role'] }}:{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}"
        + image
        + "{% elif c['type'] == 'video' %}"
        + video
        + "{% else %}{{ c['text'] }}"
        "{% endif %}{% endfor %}" + end + "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )


def gemma3(model: Any) -> Any:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    begin, end = "<start_of_image>", "<end_of_image>"
    side = model.config.vision_config.image_size
    special = {model.config.boi_token_index: begin, model.config.eoi_token_index: end, IMAGE: "<image_soft_token>"}
    extra = {"boi_token": begin, "eoi_token": end, "image_token": "<image_soft_token>"}
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": side, "width": side}),
        tokenizer=tokenizer(special, extra_special_tokens=extra),
        image_seq_length=model.config.mm_tokens_per_image,
        chat_template=template(begin),
    )


def _idefics_tokens() -> dict[int, str]:
    return {
        IMAGE: "<image>",
        MARKERS[0]: "<fake_token_around_image>",
        MARKERS[1]: "<end_of_utterance>",
        MARKERS[2]: "<global-img>",
        MARKERS[3]: "<row_1_col_1>",
        MARKERS[4]: "<row_1_col_2>",
        MARKERS[5]: "<row_2_col_1>",
        MARKERS[6]: "<row_2_col_2>",
    }


def idefics3(model: Any) -> Any:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        ),
        tokenizer=tokenizer(_idefics_tokens()),
        image_seq_len=(SIDE // PATCH // 2) ** 2,
        chat_template=template("<image>"),
    )


def smolvlm(model: Any) -> Any:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    sizes: dict[str, Any] = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**sizes),
        video_processor=SmolVLMVideoProcessor(**sizes),
        tokenizer=tokenizer(_idefics_tokens()),
        image_seq_len=(SIDE // PATCH // 2) ** 2,
        chat_template=template("<image>"),
    )


def _qwen(model: Any, processor: Any, video: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    sizes = {
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 140 * 140},
    }
    special = {
        IMAGE: "<|image_pad|>",
        VIDEO: "<|video_pad|>",
        model.config.vision_start_token_id: "<|vision_start|>",
        model.config.vision_end_token_id: "<|vision_end|>",
    }
    around = "<|vision_start|>{}<|vision_end|>"
    return processor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        video_processor=video(**{**sizes, "size": {"shortest_edge": 4 * 56 * 56, "longest_edge": 6 * 84 * 84}}),
        tokenizer=tokenizer(special),
        chat_template=template(around.format("<|image_pad|>"), around.format("<|video_pad|>")),
    )


def qwen2_vl(model: Any) -> Any:
    from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor

    return _qwen(model, Qwen2VLProcessor, Qwen2VLVideoProcessor)


def qwen2_5_vl(model: Any) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    return _qwen(model, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)


def qwen3_vl(model: Any) -> Any:
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    return _qwen(model, Qwen3VLProcessor, Qwen3VLVideoProcessor)


def cohere_compass(model: Any) -> Any:
    from transformers import CohereCompassImageProcessor, CohereCompassProcessor, CohereCompassVideoProcessor

    sizes = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    special = {
        IMAGE: "<|IMAGE_PAD|>",
        VIDEO: "<|VIDEO_PAD|>",
        model.config.vision_start_token_id: "<|VISION_START|>",
        model.config.vision_end_token_id: "<|VISION_END|>",
    }
    around = "<|VISION_START|>{}<|VISION_END|>"
    return CohereCompassProcessor(
        image_processor=CohereCompassImageProcessor(
            **sizes, size={"shortest_edge": 56 * 56, "longest_edge": 140 * 140}
        ),
        video_processor=CohereCompassVideoProcessor(
            **sizes, size={"shortest_edge": 4 * 56 * 56, "longest_edge": 6 * 84 * 84}
        ),
        tokenizer=tokenizer(special),
        chat_template=template(around.format("<|IMAGE_PAD|>"), around.format("<|VIDEO_PAD|>")),
    )


def paddleocr_vl(model: Any) -> Any:
    from transformers import PaddleOCRVLProcessor
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

    begin, end, image = "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>"
    special = {IMAGE: image, model.config.vision_start_token_id: begin, model.config.vision_end_token_id: end}
    return PaddleOCRVLProcessor(
        image_processor=PaddleOCRVLImageProcessorPil(
            patch_size=PATCH, size={"shortest_edge": 56 * 56, "longest_edge": 140 * 140}
        ),
        tokenizer=tokenizer(special, extra_special_tokens={"image_token": image, "begin": begin, "end": end}),
        chat_template=template(begin + image + end),
    )


def kimi_k25(model: Any) -> Any:
    from transformers import Kimi_K25ImageProcessor, Kimi_K25Processor, Kimi_K25VideoProcessor

    begin, end = "<|media_begin|>", "<|media_end|>"
    special = {
        IMAGE: "<|media_pad|>",
        VIDEO: "<|kimi_k25_video_placeholder|>",
        model.config.vision_start_token_id: begin,
        model.config.vision_end_token_id: end,
    }
    return Kimi_K25Processor(
        image_processor=Kimi_K25ImageProcessor(patch_size=PATCH, size={"max_height": 10, "max_width": 10}),
        video_processor=Kimi_K25VideoProcessor(patch_size=PATCH),
        tokenizer=tokenizer(special),
        chat_template=template(begin + "<|media_pad|>" + end),
    )


def internvl(model: Any) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    begin, end, context = "<img>", "</img>", "<IMG_CONTEXT>"
    names = {
        "start_image_token": begin,
        "end_image_token": end,
        "context_image_token": context,
        "video_token": "<video>",
    }
    size = {"height": SIDE, "width": SIDE}
    special = {MARKERS[0]: begin, MARKERS[1]: end, IMAGE: context, VIDEO: "<video>"}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6),
        video_processor=InternVLVideoProcessor(size=size),
        tokenizer=tokenizer(special, extra_special_tokens=names),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        chat_template=template(context, "<video>"),
    )


def qianfan_ocr(model: Any) -> Any:
    from transformers import QianfanOCRProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    begin, end, context = "<img>", "</img>", "<IMG_CONTEXT>"
    names = {"start_image_token": begin, "end_image_token": end, "context_image_token": context}
    return QianfanOCRProcessor(
        image_processor=GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_patches=1, max_patches=6),
        tokenizer=tokenizer({MARKERS[0]: begin, MARKERS[1]: end, IMAGE: context}, extra_special_tokens=names),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        chat_template=template("<image>"),
    )


def ovis2(model: Any) -> Any:
    from transformers import Ovis2Processor
    from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

    names = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    special = dict(zip(model.config.visual_indicator_token_ids, names, strict=True))
    size = {"height": SIDE, "width": SIDE}
    return Ovis2Processor(
        image_processor=Ovis2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=6),
        tokenizer=tokenizer({**special, IMAGE: "<IMG_ATOM>", MARKERS[5]: "<image>"}),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        chat_template=template("<image>"),
    )


def llava_onevision(model: Any) -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    size = {"height": SIDE, "width": SIDE}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=model.config.image_grid_pinpoints),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=model.config.vision_aspect_ratio,
        chat_template=template("<image>", "<video>"),
    )


def llava_next_video(model: Any) -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    size = {"height": SIDE, "width": SIDE}
    return LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=model.config.image_grid_pinpoints
        ),
        video_processor=LlavaNextVideoVideoProcessor(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer=tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>", "<video>"),
    )


def video_llava(model: Any) -> Any:
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    size = {"height": SIDE, "width": SIDE}
    return VideoLlavaProcessor(
        image_processor=VideoLlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size=size),
        video_processor=VideoLlavaVideoProcessor(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer=tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>", "<video>"),
    )


PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "gemma3": gemma3,
    "idefics3": idefics3,
    "ovis2": ovis2,
    "paddleocr-vl": paddleocr_vl,
    "qianfan-ocr": qianfan_ocr,
}
"""By the name of the row."""
NEED_TORCHVISION: dict[str, Callable[[Any], Any]] = {
    "cohere-compass": cohere_compass,
    "internvl": internvl,
    "kimi-k2.5": kimi_k25,
    "llava-next-video": llava_next_video,
    "llava-onevision": llava_onevision,
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
    "smolvlm": smolvlm,
    "video-llava": video_llava,
}
if HAVE_TORCHVISION:
    PROCESSORS |= NEED_TORCHVISION
