"""Engines of several workers, which are processes: a checkpoint that they can share, and what each of them kept.

Workers import this module to run functions of it, so it imports as little as it can.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engines import BUNDLED, engine

SIDE, PATCH = 144, 12


def llava(tower: str, folder: Path, crops: bool = False) -> Path:
    """A small LLaVA of random weights with four heads everywhere, and the bundled model's words.

    Args:
        tower: "clip" or "siglip".
        crops: LLaVA-NeXT instead, with "clip".
    """
    import torch
    from transformers import (
        AutoProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaProcessor,
        SiglipImageProcessor,
    )

    target = folder / f"four-heads-{tower}{'-next' if crops else ''}"
    if target.exists():
        return target
    bundled = LlavaConfig.from_pretrained(BUNDLED / "llava")
    heads = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision = {"model_type": f"{tower}_vision_model", **heads, "image_size": SIDE, "patch_size": PATCH}
    pinpoints = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]} if crops else {}
    config = (LlavaNextConfig if crops else LlavaConfig)(
        vision_config=vision | ({"vision_use_head": False} if tower == "siglip" else {}),
        text_config=bundled.text_config.to_dict() | heads | {"num_key_value_heads": 2, "head_dim": 64},
        image_token_index=bundled.image_token_id,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        tie_word_embeddings=True,
        **pinpoints,
    )
    model: Any = (LlavaNextForConditionalGeneration if crops else LlavaForConditionalGeneration)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # as lively as trained ones, so that no two patches are alike
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    model.save_pretrained(target)
    shutil.copy(BUNDLED / "llava/generation_config.json", target)
    processor = AutoProcessor.from_pretrained(BUNDLED / ("llava-next" if crops else "llava"))
    if tower == "siglip":
        processor = LlavaProcessor(
            SiglipImageProcessor(size={"height": SIDE, "width": SIDE}),
            processor.tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="full",
            chat_template=processor.chat_template,
            num_additional_image_tokens=0,
        )
    processor.save_pretrained(target)
    return target


@contextmanager
def several_workers(
    folder: Path,
    architecture: str = "LlavaForConditionalGeneration",
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Iterator[Any]:
    """An engine, `tensor_parallel_size` or `pipeline_parallel_size` of which is above 1; see `kept_by_each`."""
    import patience  # in workers, this module is imported without vLLM's

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions of this module travel to the workers
        # Without a cache of encoded images, every question is one run of the tower.
        options = {"keep": 16, "tower_cache_mb": 0} | (options or {})
        patient = f"{patience.__name__}.{patience.Patience.__name__}"
        processes = {"distributed_executor_backend": "mp", "worker_extension_cls": patient}
        llm = engine(folder, architecture, options, **processes, **arguments)
        try:
            llm.apply_model(_watch)
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def kept_by_each(llm: Any) -> list[list[list[int]]]:
    """[worker][image]: the tokens kept since it was asked last."""
    return llm.apply_model(_seen)


@contextmanager
def own_heads_alone(llm: Any) -> Iterator[None]:
    """What must not happen: every worker scores by the heads that it holds."""
    llm.apply_model(_deafen)
    yield
    llm.apply_model(_mend)


@contextmanager
def second_worker_chooses_others(llm: Any) -> Iterator[None]:
    """As if the second worker's scores had come out a little different."""
    llm.apply_model(_disturb)
    yield
    llm.apply_model(_mend)


def _watch(model: Any) -> None:
    model.adafv_seen = []
    model.adafv_patch = pytest.MonkeyPatch()
    hand_over = model.hand_over

    def recording(image: Any, kept: Any, features: Any) -> Any:
        model.adafv_seen.append(kept.tolist())
        return hand_over(image, kept, features)

    model.hand_over = recording


def _seen(model: Any) -> list[list[int]]:
    found, model.adafv_seen = model.adafv_seen, []
    return found


def _mend(model: Any) -> None:
    model.adafv_patch.undo()


def _deafen(model: Any) -> None:
    from adafv.engines.vllm import tap

    model.adafv_patch.setattr(tap, "tensor_model_parallel_all_gather", lambda states, dim: states)


def _disturb(model: Any) -> None:
    import torch
    from vllm.distributed import get_tensor_model_parallel_rank

    from adafv.core.tokens import Kept

    if get_tensor_model_parallel_rank() == 1:

        def first_ones(method: Any, tokens: Any, keep: int) -> Any:
            return Kept(torch.arange(keep).unsqueeze(0))

        model.adafv_patch.setattr(type(model.adafv.method), "select", first_ones)


def signals_of_each(llm: Any, wanted: Any, ask: Any) -> list[list[dict[Any, Any]]]:
    """[worker][image]: what its tap reads of the wanted signals while `ask` runs, as lists of numbers."""
    llm.apply_model(partial(_tap, wanted))
    ask()
    return llm.apply_model(_tapped)


def _tap(wanted: Any, model: Any) -> None:
    model.adafv_signals = wanted
    model.adafv_tap = model.tap()
    model.adafv_images = []
    encode = model.encode

    def recording(images: Any) -> Any:
        encoded = encode(images)
        model.adafv_images += encoded
        return encoded

    model.encode = recording


def _tapped(model: Any) -> list[dict[Any, Any]]:
    return [{name: values.tolist() for name, values in image.signals.items()} for image in model.adafv_images]
