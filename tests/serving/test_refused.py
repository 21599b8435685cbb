"""Ways of running vLLM that are refused when it starts, by vLLM's own reading of its options."""

from pathlib import Path
from typing import Any

import pytest
from engines import BUNDLED
from qwen_checkpoints import qwen
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY

from adafv.engines.vllm.model import check_engine
from adafv.errors import OptionError, UnsupportedModelError

STOCK, QWEN = "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"


def configured(
    adafv: dict[str, Any], folder: Path = BUNDLED / "llava", architecture: str = STOCK, **options: Any
) -> Any:
    """vLLM's config for a checkpoint, by default the bundled model."""
    overrides = {"architectures": [f"AdaFV{architecture}"], "adafv": adafv}
    arguments = EngineArgs(str(folder), dtype="float32", max_model_len=512, hf_overrides=overrides, **options)
    return arguments.create_engine_config()


def test_nothing_else_is() -> None:
    check_engine(configured({"keep": 16}))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enable_lora": True}, "--enable-lora"),
        ({"enable_mm_embeds": True}, "--enable-mm-embeds"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"compilation_config": {"compile_mm_encoder": True}}, "compile_mm_encoder"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
    ],
)
def test_engine(options: dict[str, Any], named: str) -> None:
    config = configured({"keep": 16}, **options)
    with pytest.raises(UnsupportedModelError, match=named):
        check_engine(config)


def test_towers_that_share_images_out(checkpoints: Path) -> None:
    """vLLM itself turns the option down for LLaVA, not for Qwen."""
    folder = qwen(QWEN, checkpoints)
    config = configured({"keep": 16}, folder, QWEN, mm_encoder_tp_mode="data", tensor_parallel_size=2)
    with pytest.raises(UnsupportedModelError, match="--mm-encoder-tp-mode data"):
        check_engine(config)


@pytest.mark.parametrize(
    ("adafv", "options", "reason"),
    [
        ({}, {}, "the option keep is missing"),
        ({"keep": 16, "method": "downsample"}, {}, "acts at the stage 'image', which vLLM does not have"),
        ({"keep": 16, "parameters": {"variant": "published"}}, {}, "published variant"),
        ({"keep": 16}, {"mm_processor_kwargs": {"adafv": {"keep": 8}}}, "no effect in --mm-processor-kwargs"),
    ],
)
def test_options_of_the_server(adafv: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    config = configured(adafv, **options).model_config
    with pytest.raises(OptionError, match=reason):
        _ = MULTIMODAL_REGISTRY.create_processor(config).info.settings
