"""The ways to a first token that are measured beside each other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from adafv.core import published_search, published_tokens, text_to_image_attention
from adafv.core.budget import Budget
from adafv.core.stages import stage
from adafv.engines.transformers.encoded import encode
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.wrapper import PrunedModel, Pruner
from adafv.errors import UnsupportedModelError
from adafv.evaluation.speed.shapes import Subject
from adafv.evaluation.speed.stages import LAYERS, staged
from adafv.methods import Method

PROJECTORS = ("multi_modal_projector", "connector", "visual.merger", "vision_tower.merger", "aligner")
"""Where stock models keep what maps the tower's tokens to those of the language model."""
TOWERS = ("vision_tower", "visual", "vision_model")


@dataclass
class Way:
    """One way from inputs to logits of the next token."""

    name: str
    keep: int | float | str | None
    """As asked for; None: all."""
    run: Callable[[], Any]
    """The model's output, with `logits` [B, 1, V] and a cache."""
    handle: PrunedModel | None = None
    """Of pruned ways; it has the record of the last run."""
    encodes: bool = True
    """Whether the tower is part of it."""
    generates: bool = False
    """Whether it can go on: `generate` is measured on it."""


@contextmanager
def listened_to(subject: Subject) -> Iterator[None]:
    """Within, tower, projector and, of a slice, the decoder layers of a model are stages."""
    base = subject.model.model
    modules: dict[str, Any] = {}
    for stage_name, places in (("tower", TOWERS), ("projector", PROJECTORS)):
        found = [module for place in places if (module := _submodule(base, place)) is not None]
        if found:
            modules[stage_name] = found[0]
    if not subject.whole:
        modules[LAYERS] = list(base.language_model.layers)
    with staged(modules):
        yield


def _submodule(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def unpruned(subject: Subject, inputs: dict[str, Any]) -> Way:
    """The stock model as it is."""

    def run() -> Any:
        with stage("prefill"):
            return subject.model(**inputs, logits_to_keep=1, use_cache=True)

    return Way("unpruned", None, run, generates=True)


def pruned(subject: Subject, inputs: dict[str, Any], keep: Any, method: str | Method = "adafv") -> Way:
    """The stock model within a `Pruner`."""
    handle = Pruner(method, keep=keep)(subject.model)

    def run() -> Any:
        with handle:
            return subject.model(**inputs, logits_to_keep=1, use_cache=True)

    return Way(method if isinstance(method, str) else label(method), keep, run, handle, generates=True)


def again(subject: Subject, inputs: dict[str, Any], keep: Any) -> Way:
    """Another question on a picture that was encoded before: no tower."""
    encoded = encode(subject.model, inputs)
    asked = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
    way = pruned(subject, {**asked, "images": encoded}, keep)
    way.name, way.encodes, way.generates = "adafv, encoded", False, False
    return way


def label(method: Method) -> str:
    """A method by its name and the options that are not its defaults."""
    own: Any = method
    changed = [getattr(own, each.name) for each in fields(own) if each.init and getattr(own, each.name) != each.default]
    return " ".join([method.name, *map(str, changed)])


def ideal(subject: Subject, inputs: dict[str, Any], keep: Any) -> Way:
    """The tower, and a prefill with exactly K visual tokens, the first ones: no scores, no search, nothing written around.
    No way that encodes the image and reads K tokens can be faster."""
    model = subject.model
    short = _Shortened(subject, inputs, keep)
    visuals = {name: value for name, value in inputs.items() if name in family_of(model).images}

    def run() -> Any:
        features = model.model.get_image_features(**visuals, return_dict=True).pooler_output
        return short.prefill(torch.stack([each[: short.keep] for each in features]))

    return Way("ideal", keep, run)


def published(subject: Subject, inputs: dict[str, Any], keep: Any) -> Way:
    """As the published code goes about it: attention maps of all layers of the tower (eager attention), its own search.

    Raises:
        UnsupportedModelError: the model is not one that it was written for: LLaVA-1.5 and LLaVA-NeXT on a CLIP tower.
    """
    model = subject.model
    if type(model).__name__ not in ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration") or (
        type(model.model.vision_tower).__name__ != "CLIPVisionModel"
    ):
        raise UnsupportedModelError(f"there is no published code for {type(model).__name__}")
    tower, projector = _eager_twin(model.model.vision_tower), model.model.multi_modal_projector
    pixels = inputs["pixel_values"]
    crops = pixels.shape[1] if pixels.dim() == 5 else 1
    short = _Shortened(subject, inputs, keep, lambda count: published_tokens(count, crops))
    layer = model.config.vision_feature_layer

    def run() -> Any:
        with stage("tower"):
            seen = tower(pixels.flatten(0, -4), output_attentions=True, output_hidden_states=True)
            saliency = seen.attentions[layer][:, :, 0, 1:].float().mean(1).unflatten(0, (-1, crops))
        with stage("projector"):
            features = projector(seen.hidden_states[layer][:, 1:]).unflatten(0, (-1, crops)).flatten(1, 2)
        with stage("scores"):
            attention = text_to_image_attention(short.words()[:, short.first :], features)  # behind the image, as there
        with stage("selection"):
            chosen = published_search(attention, saliency, keep=short.asked)
            kept = features.gather(1, chosen.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        return short.prefill(kept)

    return Way("published way", keep, run)


class _Shortened:
    """A batch of like prompts with fewer visual tokens, put together by hand."""

    def __init__(
        self, subject: Subject, inputs: dict[str, Any], keep: Any, really: Callable[[int], int] = lambda count: count
    ) -> None:
        self.model = subject.model
        ids = inputs["input_ids"]
        visual = (ids[0] == self.model.config.image_token_id).nonzero()[:, 0].tolist()
        self.first, self.text_ids = visual[0], torch.cat((ids[:, : visual[0]], ids[:, visual[-1] + 1 :]), dim=1)
        self.asked = Budget.of(keep).tokens(len(visual))
        self.keep = really(self.asked)
        self.mask = torch.ones(len(ids), self.text_ids.shape[1] + self.keep, dtype=torch.long, device=ids.device)

    def words(self) -> Tensor:
        """[B, T, D], embeddings of the text."""
        return self.model.get_input_embeddings()(self.text_ids)  # type: ignore[no-any-return]

    def prefill(self, features: Tensor) -> Any:
        """[B, K, D] -> the language model's output, with the logits of the last column."""
        with stage("prefill"):
            words = self.words()
            embeds = torch.cat((words[:, : self.first], features.to(words.dtype), words[:, self.first :]), dim=1)
            output = self.model.model.language_model(inputs_embeds=embeds, attention_mask=self.mask, use_cache=True)
            output.logits = self.model.lm_head(output.last_hidden_state[:, -1:])
            return output


def _eager_twin(stock: Any) -> Any:
    """The same tower, weights shared, with eager attention."""
    import copy

    from transformers.initialization import no_init_weights

    config = copy.deepcopy(stock.config)
    config._attn_implementation = "eager"
    with stock.device, no_init_weights():
        eager = type(stock)._from_config(config, dtype=stock.dtype)
    eager.load_state_dict(stock.state_dict(), assign=True)
    return eager.eval()
