"""In vLLM's front: K placeholders per image, and keys by which its caches tell image, question and budget apart.

vLLM's processor cache, encoder cache and prefix cache all know an image by one name: a hash of its pixels and of the
processor's options, or what the client calls it. Here that name also covers the words that count and the budget, per
image: so what turn 1 of a chat put into the caches is found again in turn 2, even if turn 2 shows another image. What a
request wants of its images travels with its items, never on the processor: vLLM may run it in several threads.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement
from vllm.multimodal.processing.inputs import ProcessorInputs

from adafv.core import Budget, ImageLayout
from adafv.core.crops import Crops
from adafv.engines.serving.request import Reader, Wish, check_placeholders, digest
from adafv.engines.serving.settings import OPTION, ServerSettings
from adafv.engines.vllm import check_crops
from adafv.errors import OptionError, UnsupportedCallError, UnsupportedModelError
from adafv.images import check_shape
from adafv.prompts.prompt import special_tokens
from adafv.prompts.text import resolve_scope

TEXT, BUDGET, IMAGE = "adafv_text", "adafv_budget", "adafv_image"
FIELDS = (TEXT, BUDGET, IMAGE)
"""What travels with every image to the worker; see `Wish.encoded` and `digest`."""

_WANTED = "adafv_wanted"
"""Attribute of the items of one request: what is wanted of its images."""


@dataclass(frozen=True)
class _Wanted:
    """A wish on its way from the request to the worker."""

    wish: Wish
    image: str
    """A hash of its pixels and of the processor's options: which image it is, whatever is asked about it."""


class PrunedInfo:
    """In front of a family's `ProcessingInfo`: images alone, and the tokens that they make at most."""

    @cached_property
    def settings(self) -> ServerSettings:
        """The server's options."""
        if OPTION in (self.ctx.get_mm_config().mm_processor_kwargs or {}):  # type: ignore[attr-defined]
            raise OptionError(
                f"{OPTION} has no effect in --mm-processor-kwargs; give the server's options in --hf-overrides"
            )
        return ServerSettings.of(getattr(self.get_hf_config(), OPTION, None))  # type: ignore[attr-defined]

    @abstractmethod
    def layout(self, image: Mapping[str, Any]) -> ImageLayout:
        """Where the visual tokens of an image come from, as the worker will lay it out.

        Args:
            image: what the processor made of it, by name.
        """

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        # Videos are not pruned here yet, and an unpruned one would be more than the server promises.
        return {"image": super().get_supported_mm_limits()["image"]}  # type: ignore[misc]

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        tokens = super().get_mm_max_tokens_per_item(seq_len, mm_counts)  # type: ignore[misc]
        if tokens is None:
            return None
        return {modality: self.settings.most.tokens(count) for modality, count in tokens.items() if modality == "image"}


class PrunedProcessor:
    """In front of a family's multi-modal processor."""

    info: Any

    @cached_property
    def reader(self) -> Reader:
        """Of the words that count; the server's model never changes, so neither does it."""
        config, model = self.info.get_hf_config(), self.info.ctx.model_config
        placeholder = image_placeholder(config)
        generation = SimpleNamespace(**model.try_get_generation_config())
        ends, special = special_tokens(config, generation, {placeholder})
        scope, template = resolve_scope(self.info.settings.scope, self.info.get_hf_processor())
        return Reader(placeholder, ends, special, scope, template)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """The most tokens that an image can make, for vLLM to reserve memory by."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        text: tuple[int, ...] = ()
        if self.info.settings.method.needs_words:
            text = (self.reader.placeholder,)  # any token; a template that cannot be read is found out at the start
        images = inputs.mm_data_items.get_count("image", strict=False)
        return self._known_by([Wish(self.info.settings.most, text)] * images, inputs)

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        if not hasattr(inputs.mm_data_items, _WANTED):
            options = dict(inputs.hf_processor_mm_kwargs)
            asked = options.pop(OPTION, None)
            budget, crops = self.info.settings.asked(asked), self.info.settings.crops_asked(asked)
            check_crops(crops, self.info.get_hf_config().architectures[0])
            self._check_options(options)
            self._check_shapes(inputs.mm_data_items)
            wishes = self._wishes(inputs, budget, crops)
            inputs = self._known_by(wishes, replace(inputs, hf_processor_mm_kwargs=options))
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _check_options(self, options: Mapping[str, object]) -> None:
        """Raise OptionError for a request's options that are not adafv's: some fail in the worker, and end the server."""
        own = self.info.ctx.get_mm_config().mm_processor_kwargs or {}
        for name, value in options.items():
            if name not in own or own[name] != value:
                raise OptionError(
                    f"mm_processor_kwargs of a request can set {OPTION!r} alone here, not {name!r}; the server can, for all "
                    "requests, with --mm-processor-kwargs"
                )

    def _check_shapes(self, mm_data_items: Any) -> None:
        """Raise ImageError for an image of which the image processor would make far more pixels than it has."""
        items = mm_data_items.get("image")
        if not isinstance(items, ImageProcessorItems):
            return
        image_processor = getattr(self.info.get_hf_processor(), "image_processor", None)
        for index in range(items.get_count()):
            if items.get(index) is not None:  # else it is named only, and was checked when it was sent
                width, height = items.get_image_size(index)
                check_shape((width, height), f"image {index + 1} of the request", image_processor)

    def _known_by(self, wishes: list[Wish], inputs: ProcessorInputs) -> ProcessorInputs:
        """The same inputs, whose images are known to every cache by what is wanted of them, too.

        vLLM takes names that come with images for what its caches know them by, so it does not look at their pixels again.
        """
        if not wishes:
            return inputs
        vllm_knows = self.info.model_id, self.info.ctx.get_mm_config().mm_hasher_algorithm
        names = inputs.get_mm_hashes(*vllm_knows)["image"]
        # A client may give two images one name. Were encoded images known by it, the second would be pruned to the first
        # one's size, and the worker would find more or fewer tokens than the prompt has places for.
        images = (
            replace(inputs, mm_uuid_items=None).get_mm_hashes(*vllm_knows)["image"] if inputs.mm_uuid_items else names
        )
        setattr(inputs.mm_data_items, _WANTED, [_Wanted(*pair) for pair in zip(wishes, images, strict=True)])
        keys = [wish.key(name, self.info.settings.identity) for wish, name in zip(wishes, names, strict=True)]
        return replace(inputs, mm_uuid_items={**(inputs.mm_uuid_items or {}), "image": keys})

    def _wishes(self, inputs: ProcessorInputs, budget: Budget, crops: Crops) -> list[Wish]:
        items = inputs.mm_data_items.get("image")
        if items is None:
            return []
        if not isinstance(items, ImageProcessorItems):
            raise UnsupportedCallError(
                "image embeddings come without the attention of the tower, so they cannot be pruned; send the images"
            )
        count = items.get_count()
        if (budget.keeps_all and not crops.chosen) or not self.info.settings.method.needs_words:
            check_placeholders(inputs.prompt, image_placeholder(self.info.get_hf_config()), count)
            return [Wish(budget, (), crops)] * count
        return [Wish(budget, text, crops) for text in self.reader.texts(inputs.prompt, count)]

    def _get_cache_missing_items(self, cache: Any, mm_data_items: Any, mm_hashes: Any) -> tuple[Any, Any]:
        try:
            cached, missing = super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)  # type: ignore[misc]
        except ValueError as error:  # an image that was named, not sent
            raise UnsupportedCallError(
                f"{error} By its name alone an image is known with the question and budget it was sent with; send it again"
            ) from error
        pairs = zip(getattr(mm_data_items, _WANTED, []), cached.get("image", []), strict=True)
        setattr(missing, _WANTED, [wanted for wanted, is_cached in pairs if not is_cached])
        return cached, missing

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        data = super()._apply_hf_processor_main(mm_items, hf_kwargs)  # type: ignore[misc]
        wanted = getattr(mm_items, _WANTED, [])
        if wanted:
            texts, budgets = zip(*(each.wish.encoded() for each in wanted), strict=True)
            data.update({TEXT: list(texts), BUDGET: list(budgets), IMAGE: [digest(each.image) for each in wanted]})
        return data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        stock = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        return {**stock, **{name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in FIELDS}}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        counts = [
            partial(self._tokens, wanted.wish, out_mm_kwargs, index)
            for index, wanted in enumerate(getattr(mm_items, _WANTED, []))
        ]
        return [_shortened(update, counts) for update in updates if update.modality == "image"]

    def _tokens(self, wish: Wish, processed: Any, index: int, whole: int) -> int:
        """K: how many of the `whole` tokens of an image the worker will keep."""
        settings = self.info.settings
        item = processed["image"][index]
        layout = self.info.layout({name: item[name].data for name in item})
        if layout.tokens != whole:
            raise UnsupportedModelError(
                f"vLLM makes {whole} visual tokens of an image for which adafv counts {layout.tokens}; this checkpoint's "
                "processor cannot be pruned yet"
            )
        return settings.tokens_of(layout, wish.budget, bool(wish.text), wish.crops)


def _shortened(update: Any, counts: Sequence[Callable[[int], int]]) -> PromptReplacement:
    """The same replacement of an image's placeholder, with as many tokens as stay."""

    def replacement(index: int) -> list[int]:
        whole = update.content(index) if callable(update.content) else update.content
        if not isinstance(whole, list) or len(set(whole)) != 1:
            raise UnsupportedModelError(
                "vLLM puts more than placeholders in an image's place, which cannot be pruned yet"
            )
        return whole[: counts[index](len(whole))]

    return PromptReplacement(modality="image", target=update.target, replacement=replacement)


def image_placeholder(config: Any) -> int:
    """The token that stands for a visual token."""
    token = getattr(config, "image_token_id", None)
    return int(config.image_token_index if token is None else token)
