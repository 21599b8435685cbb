"""The stage "layers": visual tokens that go inside the language model, and a key/value cache that is shorter from there on.

The stock model gets the whole prompt. For the length of one call its decoder layers have hooks in front of them: at a cut
the attention of a few rows is computed from the layer's own projections, the method chooses, and from that layer on hidden
states, positions and mask have the rows that stay. The layers themselves see a shorter prompt and cache what they see. The
stock model makes positions and masks by the length of layer 0's cache, which is the whole prompt; a deeper layer gets the
columns of the mask that it has cached. Positions are those of the full prompt, so `positions` makes no difference.

A hook acts in the thread that began the call, and on its cache alone, so two threads may call one model, and whoever looks
on while it decodes may call it as well. All that is left of a call is written on
its cache: which columns each layer holds.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from adafv.core.select import Wanted, at_places, chosen_by, visual_tokens
from adafv.core.tokens import LAST_ATTENTION, WORD_ATTENTION, Cut, Kept, Plan, VisualTokens
from adafv.engines.transformers.cache import HeldColumns
from adafv.engines.transformers.call import Call, CompressedInputs, ImageJob
from adafv.engines.transformers.compaction import Compaction
from adafv.engines.transformers.record import Record
from adafv.engines.transformers.releases import cache_of
from adafv.engines.transformers.settings import setting
from adafv.engines.transformers.towers import uncompiled
from adafv.errors import MethodError, UnsupportedCallError, UnsupportedModelError

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Qwen2VLTextModel", "Qwen2_5_VLTextModel")
"""Classes of language models whose layers may see fewer tokens than the ones in front of them: attention alone, to every
token before, from separate projections, with rotary positions; and nothing that is added to tokens between layers."""
ATTENTIONS = ("eager", "sdpa")
"""Implementations of attention under which this is tested. (flash attention reads borders off positions with gaps.)"""

_SINGLE = ("num_beams", "num_return_sequences", "num_beam_groups")
_ABSENT = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "penalty_alpha",
    "dola_layers",
    "prefill_chunk_size",
    "custom_generate",
    "constraints",
    "force_words_ids",
    "output_attentions",
    "output_hidden_states",
)
"""Generation settings that run the model more than once on a prompt, or look into its layers."""


def decoder_of(model: Any) -> Any:
    """The language model, whose `layers` are the decoder layers.

    Raises:
        UnsupportedModelError: it is not one in which tokens can go.
    """
    inner: Any = getattr(model.model, "language_model", None)
    decoder: Any = uncompiled(inner)
    kind = type(decoder).__name__
    if kind not in DECODERS:
        raise UnsupportedModelError(
            f"methods that act inside the language model support {', '.join(DECODERS)}, not the {kind} of this "
            f"{type(model).__name__}; use a method that acts before it"
        )
    config = decoder.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (kind == "MistralModel" and config.sliding_window is not None):
        raise UnsupportedModelError(
            "methods that act inside the language model need layers that attend to every token before, and this one has a "
            "sliding window (or others); use a method that acts before it"
        )
    if getattr(model, "_tp_size", None) not in (None, 1):
        raise UnsupportedModelError(
            "methods that act inside the language model need all heads in one process, and this one is split (tensor "
            "parallel); load it with device_map instead of tp_plan"
        )
    if config._attn_implementation not in ATTENTIONS:
        raise UnsupportedModelError(
            f"methods that act inside the language model run under {' and '.join(ATTENTIONS)} attention, not "
            f"{config._attn_implementation}; load the model with attn_implementation='sdpa'"
        )
    return decoder


def check_call(call: Call) -> None:
    """Refuse calls in which tokens cannot go inside the language model.

    Raises:
        MethodError, UnsupportedCallError: with what would do.
    """
    inside = [job for job in call.jobs if job.cuts]
    name = inside[0].method.name

    def refuse(what: str) -> None:
        raise UnsupportedCallError(f"the method {name} acts inside the language model, where {what}")

    if len(call.prompt.tokens) != 1:
        raise MethodError(
            f"the method {name} acts inside the language model, one prompt at a time, and the batch has "
            f"{len(call.prompt.tokens)}; give the prompts one by one"
        )
    if any(job.lost for job in call.jobs):
        raise MethodError(
            f"the method {name} acts inside the language model, but another method, for an image that no word counts for, "
            "in front of it; ask about every image, or use another method"
        )
    inputs, model = call.inputs, call.model
    if call.packing is not None:
        refuse("several prompts in one row would be one; give them one by one")
    if call.prefix.length:
        refuse("new images cannot follow what is cached; start without a cache")
    if model.training and torch.is_grad_enabled():
        refuse("nothing is trained; call model.eval(), or use another method")
    for option in ("labels", "shift_labels"):
        if inputs.get(option) is not None:
            refuse(f"rows of the prompt go, and {option} with them; leave {option} out")
    cache = cache_of(inputs)
    if cache is not None and (type(cache) is not DynamicCache or getattr(cache, "offloading", False)):
        refuse(f"layers hold different numbers of tokens, which a {type(cache).__name__} cannot; use a DynamicCache()")
    _refuse_looks_inside(model, inputs, refuse)
    if call.generates:
        _check_generating(model, inputs, refuse)


def check_continued(model: Any, inputs: CompressedInputs, new_images: bool, generates: bool, wrapped: bool) -> None:
    """Refuse ways of going on with a cache some of whose layers hold fewer tokens.

    Args:
        new_images: whether the call brings images that are not cached.

    Raises:
        UnsupportedCallError: with what would do.
    """

    def refuse(what: str) -> None:
        raise UnsupportedCallError(f"tokens of this cache went inside the language model, where {what}")

    if not wrapped:
        refuse("compress() cannot reach; go on within the `with` block of a Pruner, or start without a cache")
    if new_images:
        refuse("new images cannot follow what is cached; start without a cache")
    _refuse_looks_inside(model, inputs, refuse)
    if generates:
        _check_generating(model, inputs, refuse)


def _refuse_looks_inside(model: Any, inputs: Mapping[str, Any], refuse: Callable[[str], None]) -> None:
    for option in ("output_attentions", "output_hidden_states"):
        if inputs.get(option) or getattr(model.config, option, False):
            refuse(f"layers see different numbers of tokens; leave {option} out")


def _check_generating(model: Any, inputs: Mapping[str, Any], refuse: Callable[[str], None]) -> None:
    """Refuse ways of generating that read the prompt more than once, or several rows of it."""
    for option in _SINGLE:
        if (setting(model, inputs, option) or 1) != 1:
            refuse(f"one row is decoded at a time; leave {option} out")
    for option in _ABSENT:
        if setting(model, inputs, option):
            refuse(f"the prompt is read once and its cache extended; leave {option} out")
    if setting(model, inputs, "guidance_scale") not in (None, 1.0):
        refuse("the prompt is read once; leave guidance_scale out")
    if setting(model, inputs, "use_cache") is False:
        refuse("tokens would be chosen anew for every token of the answer; leave use_cache=False out")
    if setting(model, inputs, "cache_implementation") not in (None, "dynamic"):
        refuse("layers hold different numbers of tokens; leave cache_implementation out")


@dataclass
class _Image:
    """An image on its way through the layers."""

    job: ImageJob
    number: int
    """Which of the call's images it is."""
    columns: Tensor
    """[N] long, of its placeholders in the prompt."""
    kept: Tensor
    """[n] long, which of its tokens are still there; ascending."""
    words: Tensor | None = None
    """[T] long, columns of the words that count, behind the image; None where the method needs none."""
    read: Tensor | None = None
    """[N, D], what the language model read of it."""
    embeddings: Tensor | None = None
    """[T, D], what it read of the words."""
    steps: list[tuple[int, Tensor]] = field(default_factory=list)
    """(layer, tokens that stay from it on)."""


class InsideRun:
    """One call of a model in which tokens go inside its language model."""

    def __init__(self, call: Call) -> None:
        """Of a call that brings images, after its images were encoded."""
        self.model = call.model
        self.decoder = decoder_of(call.model)
        self.depth = len(self.decoder.layers)
        self.length = call.prompt.length
        self.attended = call.prompt.attended[0].to(call.device)
        self.last = int(call.prompt.attended[0].nonzero()[-1])
        self.ids = torch.from_numpy(call.prompt.arrays.tokens[0]).to(call.device)
        self.images = [
            _Image(
                job,
                number,
                job.image.columns.to(call.device),
                torch.arange(job.image.layout.tokens, device=call.device),
                None if job.text is None else job.text.to(call.device),
            )
            for number, job in enumerate(call.jobs)
            if job.cuts
        ]
        self.reading = True
        self.held: list[Tensor | None] = [None] * self.depth
        self._begin()

    @classmethod
    def continued(cls, model: Any, held: HeldColumns, cache: Any) -> "InsideRun":
        """Of a call that goes on with a cache."""
        run = cls.__new__(cls)
        run.model, run.decoder = model, decoder_of(model)
        run.depth, run.length, run.images, run.reading = len(run.decoder.layers), held.length, [], False
        run.held = list(held.layers)
        run._begin()
        run._cache = cache
        return run

    def _begin(self) -> None:
        self.rows: Tensor | None = None
        self._thread = threading.get_ident()
        self._cache: Any = None
        self._cut: dict[tuple[int, int], tuple[Any, Any, Any]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within, the layers of the model see what stays; in this thread."""
        self._thread = threading.get_ident()
        hooks = []
        try:
            for index, layer in enumerate(self.decoder.layers):
                hook = _Hook(self, index)
                hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if self.reading:
            raise UnsupportedModelError(
                "the layers of the language model were not run as adafv expects, so nothing was dropped; it may be compiled: "
                "use the model uncompiled, or a method that acts before the language model"
            )

    # ------------------------------------------------------------------------------------------------------ in a layer

    def before(self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a decoder layer is called with; None: as it is."""
        if threading.get_ident() != self._thread:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            self._cut.clear()
        if self.reading:
            if index == 0:
                self._cache = cache_of(kwargs)
                self._read(hidden)
            with torch.no_grad():
                stays = self._choose(index, layer, hidden, kwargs)
            if stays is not None:
                hidden = hidden.index_select(1, stays.to(hidden.device))
            self.held[index] = self.rows
            if index == self.depth - 1:
                self.reading = False
            if self.rows is None:
                return None
            changed = {name: self._of_rows(name, value) for name, value in kwargs.items()}
        else:
            if self.held[index] is None or self._cache is None or cache_of(kwargs) is not self._cache:
                return None
            changed = dict(kwargs)
            if kwargs.get("attention_mask") is not None:
                changed["attention_mask"] = self._of_cached(kwargs["attention_mask"], self.held[index])
        if len(args) > 1:
            raise UnsupportedModelError("this release of transformers calls decoder layers in a way not known to adafv")
        if args:
            return (hidden,), changed
        changed["hidden_states"] = hidden
        return (), changed

    def _read(self, hidden: Tensor) -> None:
        """Note what the language model reads, in front of its first layer."""
        if hidden.shape[:2] != (1, self.length):
            raise UnsupportedCallError(
                f"the language model got [{', '.join(map(str, hidden.shape[:2]))}] tokens, not the prompt of "
                f"{self.length}; methods that act inside it read one prompt at once"
            )
        for image in self.images:
            if image.words is not None:
                image.read = hidden[0].detach().index_select(0, image.columns.to(hidden.device))
                image.embeddings = hidden[0].detach().index_select(0, image.words.to(hidden.device))

    def _choose(self, index: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Ask the methods that look at this layer; which of the rows stay from it on, None: all."""
        stays = self._take_out(index)  # chosen by the layer in front of it
        for ahead in (0, 1):
            # Those that go here first: the layer's attention to what is left is what the next cut may ask for.
            rated = [
                (image, cut)
                for image in self.images
                for cut in image.job.cuts
                if cut.rated == index and cut.layer == index + ahead
            ]
            if not rated:
                continue
            seen = hidden if stays is None else hidden.index_select(1, stays.to(hidden.device))
            home = layer.input_layernorm.weight.device
            if home.type != "meta":  # else it is loaded, and what it is given moved, when it is called
                seen = seen.to(home)
            rows = self._rows_now.to(seen.device)
            looks = _Attention(layer, seen, rows, self.attended, kwargs["position_embeddings"])
            for image, cut in rated:
                image.steps.append((cut.layer, self._select(image, cut, looks)))
            more = self._take_out(index) if ahead == 0 else None
            if more is not None:
                stays = more if stays is None else stays[more]
        return stays

    @property
    def _rows_now(self) -> Tensor:
        """[n] long, the columns of the prompt that are still there."""
        return torch.arange(self.length, device=self.attended.device) if self.rows is None else self.rows

    def _select(self, image: _Image, cut: Cut, looks: "_Attention") -> Tensor:
        """[K] long, which tokens of an image stay."""
        job, kept = image.job, image.kept
        device = looks.rows.device
        columns, place = image.columns.to(device)[kept.to(device)], kept.to(device)
        tokens = at_places(self._shown(image, device), place)
        looked = {}
        if LAST_ATTENTION in job.method.needs:
            last = torch.tensor([self.last], device=device)
            looked[LAST_ATTENTION] = looks.of(last, columns)
        if WORD_ATTENTION in job.method.needs:
            assert image.words is not None
            looked[WORD_ATTENTION] = looks.of(image.words.to(device), columns).mT.unsqueeze(0)
        tokens = replace(tokens, signals={**tokens.signals, **looked})
        chosen = chosen_by(job.method, tokens, cut.keep)
        if chosen.weights is not None:
            raise MethodError(
                f"the method {job.method.name} merges tokens inside the language model, where they only go"
            )
        return place[chosen.indices[0]].to(kept.device)

    def _shown(self, image: _Image, device: torch.device) -> VisualTokens:
        """All tokens of an image, as in front of the language model; but for methods that look at words, as it read them."""
        job = image.job
        assert job.encoded is not None
        features = job.encoded.features.detach() if image.read is None else image.read
        signals = {signal: values.to(device) for signal, values in job.encoded.signals.items()}
        encoded = replace(job.encoded, features=features.to(device), signals=signals)
        words = ids = None
        if image.words is not None:
            assert image.embeddings is not None
            words, ids = image.embeddings.to(device), self.ids[image.words]
        tokens = visual_tokens([Wanted(encoded, job.method, Plan(len(features)), len(features), words, ids)])
        return replace(tokens, read=tokens.features)

    def _take_out(self, index: int) -> Tensor | None:
        """Drop what was chosen to go from this layer on; which of the rows stay, None: all."""
        due = [image for image in self.images if image.steps and image.steps[-1][0] == index]
        due = [image for image in due if len(image.kept) > len(image.steps[-1][1])]
        if not due:
            return None
        before = self._rows_now
        count = len(before)
        stays = torch.zeros(self.length, dtype=torch.bool, device=before.device)
        stays = stays.index_fill(0, before, True)
        for image in due:
            kept = image.steps[-1][1]
            count -= len(image.kept) - len(kept)
            stays = stays.index_fill(0, image.columns, False).index_fill(0, image.columns[kept], True)
            image.kept = kept
        # The number is known on the host, so this does not wait for the device, as `nonzero` would.
        self.rows = (~stays).to(torch.int8).argsort(stable=True)[:count]
        self._cut.clear()
        return torch.searchsorted(before, self.rows)

    def _of_rows(self, name: str, value: Any) -> Any:
        """An argument of a layer, of the rows that stay."""
        if name == "position_embeddings":
            return tuple(self._memo(part, self.rows, lambda part, rows: part.index_select(-2, rows)) for part in value)
        if not isinstance(value, Tensor):
            if name == "attention_mask" and value is not None:
                raise UnsupportedModelError(
                    f"the attention mask is a {type(value).__name__}, which is not supported inside the language model; load "
                    "the model with attn_implementation='sdpa'"
                )
            return value
        if name == "attention_mask":
            return self._memo(value, self.rows, _square)
        if name in ("position_ids", "cache_position"):
            return self._memo(value, self.rows, lambda part, rows: part.index_select(-1, rows))
        if name != "hidden_states" and self.length in value.shape:
            raise UnsupportedCallError(
                f"{name} is {list(value.shape)}, as long as the prompt, but adafv does not know what it says of tokens "
                "that go inside the language model; leave it out"
            )
        return value

    def _of_cached(self, mask: Any, held: Tensor | None) -> Any:
        """The mask of later tokens, of the columns that a layer has cached."""

        def columns(mask: Tensor, held: Tensor) -> Tensor:
            later = torch.arange(self.length, mask.shape[-1], device=mask.device)
            return mask.index_select(-1, torch.cat((held, later)))

        if not isinstance(mask, Tensor):
            raise UnsupportedModelError(f"an attention mask of type {type(mask).__name__} is not supported here")
        return self._memo(mask, held, columns)

    def _memo(self, value: Tensor, rows: Any, function: Any) -> Tensor:
        """Layers between two cuts are given the same; so it is worked out once."""
        key = (id(value), id(rows))
        if key not in self._cut:
            self._cut[key] = (value, rows, function(value, rows.to(value.device)))
        result: Tensor = self._cut[key][2]
        return result

    # ------------------------------------------------------------------------------------------------------ afterwards

    @property
    def columns_held(self) -> HeldColumns:
        return HeldColumns(self.length, tuple(self.held))

    @property
    def compaction(self) -> Compaction:
        """Of the prompt, as the last layer saw it."""
        assert self.rows is not None
        lost = torch.tensor([self.length - len(self.rows)])
        return Compaction(self.rows.unsqueeze(0), self.length, changed=True, lost=lost)

    @property
    def dropped(self) -> Tensor:
        """[1, S] bool."""
        assert self.rows is not None
        gone = torch.ones(1, self.length, dtype=torch.bool, device=self.rows.device)
        return gone.index_fill(1, self.rows, False)

    def describe(self, record: Record) -> None:
        """Write into the record what was kept."""
        assert self.rows is not None
        for image in self.images:
            entry = record.images[image.number]
            entry.selected, entry.place, entry.tokens_after = Kept(image.kept.unsqueeze(0)), 0, len(image.kept)
            entry.layers = dict(image.steps)
        record.layer_lengths = [self.length if rows is None else len(rows) for rows in self.held]
        record.prompt_length_after = record.layer_lengths[-1]
        record.columns = self.rows.unsqueeze(0)


@dataclass(frozen=True)
class _Hook:
    run: InsideRun
    index: int

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        # PyTorch adds and removes a hook, and that it wants the named arguments, one after the other; a call of another
        # thread in between gets there without them, and is none of this hook's business.
        return None if kwargs is None else self.run.before(self.index, layer, args, kwargs)

    def __reduce__(self) -> Any:
        return _no_hook, ()  # a copy of the model that is made meanwhile is one of the stock model


def _no_hook() -> Any:
    return _nothing


def _nothing(layer: Any, args: Any, kwargs: Any = None) -> None:
    return None


def _square(mask: Tensor, rows: Tensor) -> Tensor:
    """A mask [..., S, S] of some rows and the same columns."""
    if mask.dim() != 4 or mask.shape[-1] != mask.shape[-2]:
        raise UnsupportedCallError(
            f"the attention mask inside the language model is {list(mask.shape)}, not square; methods that act there read "
            "one prompt at once, without a cache of fixed length"
        )
    return mask.index_select(-2, rows).index_select(-1, rows)


class _Attention:
    """Rows of a layer's attention, from the layer's own norm and projections."""

    def __init__(self, layer: Any, hidden: Tensor, rows: Tensor, attended: Tensor, embeddings: Any) -> None:
        """
        Args:
            layer: a decoder layer.
            hidden: [1, n, D], what it is given.
            rows: [n] long, the column of the prompt that each row is; ascending.
            attended: [S] bool, the prompt's mask.
            embeddings: (cosines, sines), [..., S, d], of the whole prompt.
        """
        self._attention = attention = layer.self_attn
        self._normed = layer.input_layernorm(hidden.detach())
        rows = self.rows = rows.to(self._normed.device)
        self._embeddings = [part.to(rows.device).index_select(-2, rows) for part in embeddings]
        self._there = attended.to(rows.device)[rows]
        everything = slice(None)
        self._keys = self._projected("k", everything)  # [heads of keys, n, d]
        self._scaling: float = attention.scaling

    def of(self, queries: Tensor, columns: Tensor) -> Tensor:
        """[Q, V] float32: from columns of the prompt to others, mean over heads. Both ascending, and still there."""
        places = torch.searchsorted(self.rows, queries)
        asked = self._projected("q", places)
        heads, count, size = asked.shape
        groups = heads // len(self._keys)
        grouped = asked.reshape(-1, groups * count, size)
        logits = (grouped.float() @ self._keys.float().mT).view(heads, count, -1) * self._scaling
        seen = self._there & (self.rows <= queries.unsqueeze(1))
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        return weights[..., torch.searchsorted(self.rows, columns)].mean(0)

    def _projected(self, which: str, places: Any) -> Tensor:
        """[heads, rows, d] queries or keys, rotated."""
        attention = self._attention
        values = getattr(attention, f"{which}_proj")(self._normed[:, places])[0]
        values = values.view(len(values), -1, attention.head_dim)
        if hasattr(attention, f"{which}_norm"):
            values = getattr(attention, f"{which}_norm")(values)
        values = values.transpose(0, 1)
        cosine, sine = (_of_axes(part, attention)[places] for part in self._embeddings)
        one, two = values.chunk(2, dim=-1)
        return values * cosine + torch.cat((-two, one), dim=-1) * sine


def _of_axes(part: Tensor, attention: Any) -> Tensor:
    """[rows, d]: of positions in time, height and width, which older releases leave apart until here."""
    if part.dim() == 3:
        return part[0]
    sections = [*attention.config.rope_parameters["mrope_section"]] * 2
    return torch.cat([piece[axis % 3, 0] for axis, piece in enumerate(part.split(sections, dim=-1))], dim=-1)
