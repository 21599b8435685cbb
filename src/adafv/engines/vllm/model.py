"""In vLLM's worker: vLLM's own tower and projector, then the selection that every engine shares.

Every image is selected for by itself, though several may share a run of the tower: so what is kept of it does not depend
on what it happened to be scheduled with. With tensor parallelism every worker computes the same scores from all heads,
and the first worker's choice goes to the others: kept tokens that differ in one place would mix up two images.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, get_tp_group

from adafv.core.budget import Budget
from adafv.core.encoded import EncodedImage, TowerCache, alone
from adafv.core.select import MIX_TOKENS, TOWER, Wanted, select_tokens, take
from adafv.core.tokens import Signal
from adafv.engines.serving.metrics import Meter
from adafv.engines.serving.request import budget_from
from adafv.engines.serving.settings import OPTION, ServerSettings
from adafv.engines.vllm.processor import FIELDS
from adafv.engines.vllm.tap import Tap
from adafv.errors import UnsupportedModelError
from adafv.methods import Kept, Method


class PrunedModel:
    """In front of a family's model class."""

    supports_tower_connector_lora = False
    """An adapter of the tower would change encoded images that are cached without it."""

    projects: ClassVar[bool] = False
    """Whether what the projector reads is projected token by token, so that mixes can be: then `encode` gives the signal
    READ where it is asked for, and there is `project`."""

    language_model: Any
    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        settings = ServerSettings.of(getattr(vllm_config.model_config.hf_config, OPTION, None))
        check_engine(vllm_config)
        self.check_config(vllm_config.model_config.hf_config)
        if settings.method.mixes == TOWER and not self.projects:
            raise UnsupportedModelError(
                f"the method {settings.method.name} mixes what the projector reads, which adafv does not do in vLLM for this "
                f"model: {MIX_TOKENS}"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.adafv = settings
        self.adafv_cache = TowerCache(settings.tower_cache_bytes)
        self.adafv_meter = Meter(get_tensor_model_parallel_rank() == 0, settings.tower_cache_bytes)
        # Which images come without words is known only when they come, and what is cached of an image serves every question.
        self.adafv_signals: frozenset[Signal] = settings.method.of_tower | settings.method_without_text.of_tower
        self.adafv_tap = self.tap()
        self.adafv_encoder_tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.adafv_largest = 0  # visual tokens of the largest image so far

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Raise UnsupportedModelError where this checkpoint cannot be pruned correctly."""

    def project(self, rows: Tensor) -> Tensor:
        """[..., E], of what the projector reads -> [..., D]. Asked for where `projects`."""
        raise NotImplementedError

    @abstractmethod
    def tap(self) -> Tap:
        """On the layers of the tower that `adafv_signals` name.

        Raises:
            UnsupportedModelError: a signal cannot be read.
        """

    @abstractmethod
    def encode(self, images: dict[str, Any]) -> list[EncodedImage]:
        """Run tower and projector.

        Args:
            images: what vLLM's own `embed_multimodal` takes.
        """

    def take(self, images: dict[str, Any], wanted: Sequence[int]) -> dict[str, Any]:
        """The same entries for some of the images alone."""
        return {
            name: values[list(wanted)] if isinstance(values, Tensor) else [values[i] for i in wanted]
            for name, values in images.items()
        }

    def compared(self, features: Tensor) -> Tensor:
        """[N, D]: of the features, what is compared with the text: the tokens as the language model's input has them."""
        return features

    def hand_over(self, image: EncodedImage, kept: Tensor, features: Tensor) -> Tensor:
        """What the family's model reads for the kept tokens (`kept` [K], `features` [K, D])."""
        return features

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Also called while the server runs, by who trains the model meanwhile: images encoded before are outdated then."""
        self.adafv_cache.clear()
        return super().load_weights(weights)  # type: ignore[misc]

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """[K, D] per image."""
        if not kwargs:
            return []
        texts, budgets, digests = (kwargs.pop(name) for name in FIELDS)
        names = [bytes(each.tolist()) for each in digests]
        embeddings: list[Tensor | None] = [None] * len(names)
        for name, image in self._encoded(kwargs, names):
            for i in (i for i, other in enumerate(names) if other == name):
                embeddings[i] = pruned = self._pruned(image, texts[i], budget_from(budgets[i]))
                no_words = self._method(texts[i]) is not self.adafv.method and len(pruned) < image.layout.tokens
                self.adafv_meter.pruned(
                    image.layout.tokens, len(pruned), self.adafv.method_without_text.name if no_words else None
                )
        self.adafv_meter.say(len(self.adafv_cache), self.adafv_cache.bytes)
        return embeddings

    def _encoded(self, images: dict[str, Any], names: list[bytes]) -> Iterator[tuple[bytes, EncodedImage]]:
        """Every image once, from the cache or the tower, in such parts that whole images never take more memory at a time
        than without pruning: what vLLM counts when it fills a step is the tokens that stay."""
        missing = []
        for name in dict.fromkeys(names):
            if (image := self.adafv_cache.get(name)) is None:
                missing.append(names.index(name))
            else:
                yield name, image
        self.adafv_meter.encoded(len(missing), len(names) - len(missing))
        while missing:
            at_a_time = max(1, self.adafv_encoder_tokens // self.adafv_largest) if self.adafv_largest else 1
            part, missing = missing[:at_a_time], missing[at_a_time:]
            for i, image in zip(part, self.encode(self.take(images, part)), strict=True):
                self.adafv_largest = max(self.adafv_largest, image.layout.tokens)
                if self.adafv_cache.capacity:
                    self.adafv_cache.put(names[i], image.copy())
                yield names[i], image

    def _method(self, text: Tensor) -> Method:
        """What chooses for an image of which these words count."""
        return self.adafv.method_for(len(text) > 0)

    def _pruned(self, image: EncodedImage, text: Tensor, budget: Budget) -> Tensor:
        layout, device = image.layout, image.features.device
        plan = self.adafv.plan(layout, budget, len(text) > 0)
        if plan is None:
            # A view would keep what the tower made of the images beside it, of which vLLM counts the kept tokens alone.
            return self.hand_over(image, torch.arange(layout.tokens, device=device), alone(image.features))
        method, words = self._method(text), None
        if method.needs_words:
            words = self.language_model.embed_input_ids(text.to(device))
        compared = replace(image, features=self.compared(image.features))
        wanted = Wanted(compared, method, plan, budget.tokens(layout.tokens), words, text, project=self.project)
        [selected] = select_tokens([wanted], agreed)
        features = selected.features[0]
        if compared.features is not image.features:
            features = take(selected.kept, image.features.unsqueeze(0))[0]
        return self.hand_over(image, selected.kept.indices[0], features)


def agreed(kept: Kept) -> Kept:
    """With tensor parallelism, what the first worker chose, on every worker."""
    if get_tensor_model_parallel_world_size() == 1:
        return kept
    weights = None if kept.weights is None else get_tp_group().broadcast(kept.weights.contiguous(), src=0)
    return replace(kept, indices=get_tp_group().broadcast(kept.indices.contiguous(), src=0), weights=weights)


def check_engine(vllm_config: Any) -> None:
    """Raise UnsupportedModelError for ways of running vLLM in which pruning would go wrong, or unseen."""
    multimodal = vllm_config.model_config.multimodal_config
    compilation = vllm_config.compilation_config
    options = {
        "--mm-encoder-tp-mode data": multimodal.mm_encoder_tp_mode == "data",
        "--enable-mm-embeds": multimodal.enable_mm_embeds,
        "compile_mm_encoder in --compilation-config": getattr(compilation, "compile_mm_encoder", False),
        "cudagraph_mm_encoder in --compilation-config": getattr(compilation, "cudagraph_mm_encoder", False),
        "--enable-lora": vllm_config.lora_config is not None,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--video-pruning-rate": multimodal.is_multimodal_pruning_enabled(),
        "--pipeline-parallel-size": vllm_config.parallel_config.pipeline_parallel_size > 1,
    }
    refuse_options(options, "with pruned images")


def refuse_options(options: dict[str, bool], where: str) -> None:
    """Raise UnsupportedModelError for the first of vLLM's options that is given (name -> whether it is)."""
    for option, given in options.items():
        if given:
            raise UnsupportedModelError(f"{option} is not supported {where}; leave it out")
