"""LLaVA-1.5: one crop per image, every patch a token."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from adafv.core import ImageLayout
from adafv.core.encoded import EncodedImage
from adafv.core.layers import TowerLayers
from adafv.core.tokens import READ, Signal
from adafv.engines.transformers import towers
from adafv.engines.vllm.model import PrunedModel
from adafv.engines.vllm.processor import PrunedInfo, PrunedProcessor
from adafv.engines.vllm.tap import Tap, encoded_images
from adafv.errors import UnsupportedModelError

TOWERS = {
    "clip_vision_model": towers.TOWERS["CLIPVisionModel"],
    "siglip_vision_model": towers.TOWERS["SiglipVisionModel"],
}
"""By model type: how a tower's saliency is scored, and the `vision_feature_select_strategy` with which tokens are patches."""


class PrunedLlava(PrunedModel):
    """What the LLaVA-like model classes of vLLM share."""

    projects = True

    vision_tower: Any
    multi_modal_projector: Any

    @classmethod
    def check_config(cls, config: Any) -> None:
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if tower not in TOWERS:
            raise UnsupportedModelError(
                f"the vision tower {tower} is not supported in vLLM; supported are: {', '.join(TOWERS)}"
            )
        if strategy != (expected := TOWERS[tower].strategy):
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r}; only {expected!r} is supported with {tower}"
            )
        if not isinstance(config.vision_feature_layer, int):
            raise UnsupportedModelError("several vision feature layers are not supported in vLLM")

    @property
    def shape(self) -> towers.TowerShape:
        return TOWERS[self.config.vision_config.model_type]

    def tap(self) -> Tap:
        run = list(self.vision_tower.vision_model.encoder.layers)
        layers = TowerLayers(self.config.vision_config.num_hidden_layers, len(run))
        return Tap(run, "self_attn.attn", layers, self.adafv_signals - {READ}, int(self.shape.has_class_token))

    def project(self, rows: Tensor) -> Tensor:
        return self.multi_modal_projector(rows)  # type: ignore[no-any-return]

    def encoded(
        self, images: dict[str, Any], layouts: list[ImageLayout], to_tokens: Callable[[Tensor], list[Tensor]]
    ) -> list[EncodedImage]:
        """What vLLM's own method makes of the images: it runs tower, projector and packing.

        Args:
            to_tokens: see `Tap.read`.
        """
        image_input = self._parse_and_validate_image_input(**images)  # type: ignore[attr-defined]
        features, signals = self.tapped(lambda: self._process_image_input(image_input), to_tokens)  # type: ignore[attr-defined]
        return encoded_images(features, signals, layouts)

    def tapped(
        self, run: Callable[[], Any], to_tokens: Callable[[Tensor], list[Tensor]]
    ) -> tuple[Any, dict[Signal, list[Tensor]]]:
        """(what `run` returns, which runs tower and projector; the signals that are read meanwhile)."""
        read: list[Tensor] = []
        hook = self.multi_modal_projector.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        try:
            with self.adafv_tap as tap:
                features = run()
        finally:
            hook.remove()
        score = self.shape.score
        signals = tap.read(lambda run: score(run.query, run.key, run.value, run.features, run.scaling, None), to_tokens)
        if READ in self.adafv_signals:
            signals[READ] = to_tokens(torch.cat([rows.flatten(0, -2) for rows in read]))
        return features, signals

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(map(_as_vllm_names_it, weights))  # type: ignore[misc]


def _as_vllm_names_it(weight: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """transformers 5 saves towers without the level `vision_model`, which vLLM's loader (0.31, 0.32) expects."""
    name, values = weight
    for tower in ("model.vision_tower.", "vision_tower."):
        if name.startswith(tower) and not name.startswith(f"{tower}vision_model."):
            return f"{tower}vision_model.{name.removeprefix(tower)}", values
    return weight


def patch_grid(config: Any) -> tuple[int, int]:
    """(rows, columns) of one crop."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side


def layout_of(config: Any) -> ImageLayout:
    """Of every image."""
    rows, columns = patch_grid(config)
    return ImageLayout(torch.arange(rows * columns), crops=1, rows=rows, columns=columns)


class _Info(PrunedInfo, LlavaProcessingInfo):
    def layout(self, image: Mapping[str, Any]) -> ImageLayout:
        return layout_of(self.get_hf_config())


class _Processor(PrunedProcessor, LlavaMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=LlavaDummyInputsBuilder)
class AdaFVLlavaForConditionalGeneration(PrunedLlava, LlavaForConditionalGeneration):
    def encode(self, images: dict[str, Any]) -> list[EncodedImage]:
        layout = layout_of(self.config)
        return self.encoded(
            images, [layout] * len(images["pixel_values"]), lambda patches: list(patches.split(layout.tokens))
        )
