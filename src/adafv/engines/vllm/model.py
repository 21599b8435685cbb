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

from adafv.core.crops import of_some_crops
from adafv.core.encoded import EncodedImage, TowerCache, alone
from adafv.core.layout import ImageLayout
from adafv.core.select import MIX_TOKENS, TOWER, Wanted, among_all, select_tokens, take, whole_of
from adafv.core.tokens import Plan, Signal
from adafv.engines.serving.metrics import Meter
from adafv.engines.serving.request import budget_from
from adafv.engines.serving.settings import OPTION, ServerSettings
from adafv.engines.vllm import PREFIX, check_crops, chooses_crops
from adafv.engines.vllm.crops import ImageAsked, encode_chosen
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
        check_crops(settings.crops, self._architecture())
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
        self.adafv_signals: frozenset[Signal] = settings.signals
        self.adafv_tap = self.tap()
        self.adafv_encoder_tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.adafv_largest = 0  # visual tokens of the largest image so far

    @classmethod
    def _architecture(cls) -> str:
        """Of the stock checkpoints that this class serves."""
        return cls.__name__.removeprefix(PREFIX)

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

    def layouts(self, images: dict[str, Any]) -> list[ImageLayout]:
        """Of the images, before the tower runs. Asked for, as `encode_crops` is, where `chooses_crops` says so."""
        raise NotImplementedError

    def encode_crops(
        self, images: dict[str, Any], layouts: Sequence[ImageLayout], wanted: Sequence[tuple[int, int]]
    ) -> list[EncodedImage]:
        """Run tower and projector on some crops alone: see `adafv.engines.vllm.crops.CropEncoder`."""
        raise NotImplementedError

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
        texts, wishes, digests = (kwargs.pop(name) for name in FIELDS)
        asked = [
            ImageAsked(i, bytes(name.tolist()), text, *budget_from(wish))
            for i, (text, wish, name) in enumerate(zip(texts, wishes, digests, strict=True))
        ]
        layouts, choosing = self._choosing(kwargs, asked)
        chosen = {each.number for each in choosing}
        whole = [each for each in asked if each.number not in chosen]
        embeddings: list[Tensor | None] = [None] * len(asked)
        for name, image in self._encoded(kwargs, whole):
            for each in (each for each in whole if each.name == name):
                each.layout = image.layout
                each.plan = self._plan(each)
                embeddings[each.number] = self._pruned(each, image)
        for each, image in encode_chosen(self, kwargs, layouts, choosing, agreed_values):
            embeddings[each.number] = self._pruned(each, image)
        self.adafv_meter.say(len(self.adafv_cache), self.adafv_cache.bytes)
        return embeddings

    def _choosing(self, images: dict[str, Any], asked: list[ImageAsked]) -> tuple[list[ImageLayout], list[ImageAsked]]:
        """(the layouts of all images, those whose crops are chosen, which get their plans); neither where there are none."""
        if not chooses_crops(self._architecture()) or not any(each.crops.chosen for each in asked):
            return [], []
        layouts = self.layouts(images)
        choosing = []
        for each, layout in zip(asked, layouts, strict=True):
            each.layout = layout
            each.plan = plan = self._plan(each)
            if plan is not None and self.adafv.chooses(layout, plan, len(each.text) > 0, each.crops):
                choosing.append(each)
        return layouts, choosing

    def _plan(self, asked: ImageAsked) -> Plan | None:
        return self.adafv.plan(asked.whole, asked.budget, len(asked.text) > 0, asked.crops)

    def _encoded(self, images: dict[str, Any], asked: list[ImageAsked]) -> Iterator[tuple[bytes, EncodedImage]]:
        """Every image once, from the cache or the tower, in such parts that whole images never take more memory at a time
        than without pruning: what vLLM counts when it fills a step is the tokens that stay."""
        missing: list[ImageAsked] = []
        by_name: dict[bytes, ImageAsked] = {}
        for each in asked:
            by_name.setdefault(each.name, each)
        for name, first in by_name.items():
            if (image := self.adafv_cache.get(name)) is None:
                missing.append(first)
            else:
                yield name, image
        self.adafv_meter.encoded(len(missing), len(asked) - len(missing))
        while missing:
            at_a_time = max(1, self.adafv_encoder_tokens // self.adafv_largest) if self.adafv_largest else 1
            part, missing = missing[:at_a_time], missing[at_a_time:]
            encoded = self.encode(self.take(images, [each.number for each in part]))
            for each, image in zip(part, encoded, strict=True):
                self.adafv_largest = max(self.adafv_largest, image.layout.tokens)
                if self.adafv_cache.capacity:
                    self.adafv_cache.put(each.name, image.copy())
                yield each.name, image

    def _method(self, text: Tensor) -> Method:
        """What chooses for an image of which these words count."""
        return self.adafv.method_for(len(text) > 0)

    def words(self, asked: ImageAsked, device: torch.device) -> Tensor | None:
        """[T, D], what the words that count are embedded as; None where the method needs none."""
        if not self._method(asked.text).needs_words:
            return None
        return self.language_model.embed_input_ids(asked.text.to(device))  # type: ignore[no-any-return]

    def _pruned(self, asked: ImageAsked, image: EncodedImage) -> Tensor:
        """[K, D]: what stays of an image, of which `image` has the crops that were encoded."""
        method, tokens = self._method(asked.text), asked.whole.tokens
        pruned = self._kept_of(asked, image, method)
        no_words = method is not self.adafv.method and len(pruned) < tokens
        self.adafv_meter.pruned(tokens, len(pruned), method.name if no_words else None)
        return pruned

    def _kept_of(self, asked: ImageAsked, image: EncodedImage, method: Method) -> Tensor:
        device, plan = image.features.device, asked.plan
        if plan is None:
            # A view would keep what the tower made of the images beside it, of which vLLM counts the kept tokens alone.
            return self.hand_over(image, torch.arange(image.layout.tokens, device=device), alone(image.features))
        words = self.words(asked, device)
        compared = replace(image, features=self.compared(image.features))
        most = min(asked.budget.tokens(asked.whole.tokens), asked.crops.tokens(asked.whole))
        among = None if asked.seen is None else asked.whole.tokens
        wanted = Wanted(compared, method, plan, most, words, asked.text, project=self.project, among=among)
        if among is not None and plan.keep == image.layout.tokens:  # a method is never shown what stays anyway
            selected = whole_of(wanted)
        else:
            [selected] = select_tokens([wanted], agreed)
        features = selected.features[0]
        if compared.features is not image.features:
            features = take(selected.kept, image.features.unsqueeze(0))[0]
        if asked.seen is not None:
            selected = among_all(selected, [of_some_crops(asked.whole, asked.seen)[0]], asked.whole.tokens)
        return self.hand_over(image, selected.kept.indices[0], features)


def agreed_values(values: Tensor) -> Tensor:
    """With tensor parallelism, what the first worker computed, on every worker."""
    if get_tensor_model_parallel_world_size() == 1:
        return values
    return get_tp_group().broadcast(values.contiguous(), src=0)  # type: ignore[no-any-return]


def agreed(kept: Kept) -> Kept:
    """With tensor parallelism, what the first worker chose, on every worker."""
    weights = None if kept.weights is None else agreed_values(kept.weights)
    return replace(kept, indices=agreed_values(kept.indices), weights=weights)


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
