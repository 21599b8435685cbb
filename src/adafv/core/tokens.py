"""What a method sees of images, and what it decides: the types that methods, engines and families share.

A method names the signals that it needs; families read them off the tower, engines find the words, and `adafv.core.select`
puts them together. So a new signal is added in one place, and a method that asks for one that a family or an engine does
not have is refused before anything runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from adafv.core.layout import ImageLayout


@dataclass(frozen=True)
class Signal:
    """Something that a method may ask for besides the visual tokens themselves."""

    kind: str
    """"words", "strings"; of the tower: "saliency", "keys", "hidden", "read"; of the language model: "last attention",
    "word attention"."""
    layer: int | None = None
    """Of the tower, counted as `vision_feature_layer` counts hidden states: -1 is the last layer, 0 the embeddings. None:
    the layer that the projector reads."""

    @property
    def of_tower(self) -> bool:
        """Whether the tower says it; the others are read off the prompt."""
        return self.kind in TOWER_SIGNALS

    @property
    def of_layers(self) -> bool:
        """Whether a layer of the language model says it."""
        return self.kind in LAYER_SIGNALS

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind} of layer {self.layer}"


TOWER_SIGNALS = ("saliency", "keys", "hidden", "read")
LAYER_SIGNALS = ("last attention", "word attention")

WORDS = Signal("words")
"""Input embeddings and ids of the text that counts."""
STRINGS = Signal("strings")
"""The same as text; it needs a tokenizer."""
SALIENCY = Signal("saliency")
"""[N] float32: see `adafv.core.class_attention`, or `adafv.core.patch_saliency` for towers without [CLS]."""
KEYS = Signal("keys")
"""[N, H, d]: keys of the attention, all heads, positions applied. A token made of several patches has their mean."""
HIDDEN = Signal("hidden")
"""[N, E]: output of the layer, which is what the projector reads. A token made of several patches has their mean."""
LAST_ATTENTION = Signal("last attention")
"""[N] float32, of methods that act inside the language model: what the last token of the prompt looks at, in the layer that
a `Cut` names; mean over heads. The softmax is over all columns that it sees, so the sum is below 1."""
WORD_ATTENTION = Signal("word attention")
"""[N, T] float32: the same of each word that counts. Words in front of an image do not see it, and are left out."""

READ = Signal("read")
"""[N, E]: what the projector reads, of several layers side by side, with its gradients. Engines ask for it where a method
mixes there (`Method.mixes`); methods do not see it."""


def saliency_of(layer: int) -> Signal:
    """The saliency of another layer."""
    return Signal("saliency", layer)


def keys_of(layer: int) -> Signal:
    """The keys of another layer."""
    return Signal("keys", layer)


def hidden_of(layer: int) -> Signal:
    """The output of another layer."""
    return Signal("hidden", layer)


@dataclass(frozen=True)
class Words:
    """The text that counts for each image of a group; padded to T, on the right."""

    embeddings: Tensor
    """[G, T, D], as the language model embeds them."""
    mask: Tensor
    """[G, T] bool, False on padding."""
    ids: Tensor
    """[G, T] long; -1 on padding, and where the call gives embeddings alone."""
    strings: Sequence[Sequence[str]] | None = None
    """Per image, its tokens as text; None unless the method needs STRINGS."""

    def copy(self) -> "Words":
        """The same in memory of its own."""
        return replace(self, embeddings=self.embeddings.clone(), mask=self.mask.clone(), ids=self.ids.clone())


@dataclass(frozen=True)
class VisualTokens:
    """What a method sees: G images with the same number N of visual tokens each."""

    features: Tensor
    """[G, N, D], the visual tokens as the language model would read them. In training they carry gradients: detach them
    for scores."""
    candidates: Tensor
    """[G, N] bool, False for tokens that show no part of the image, such as newlines, and of crops that the plan leaves out:
    they are kept only when all else is."""
    source: Tensor
    """[G, N] long, where each token comes from: see `ImageLayout`."""
    crops: int
    rows: int
    columns: int
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    """What the method needs of the tower, [G, N, ...] each. What stands at tokens that show no patch is 0."""
    words: Words | None = None
    """None unless the method needs WORDS."""
    tiling: tuple[int, int] | None = None
    """(vertical, horizontal) arrangement of the crops behind a thumbnail: see `ImageLayout`."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of `features` where the plan asked for a lower resolution: then they are [G, rows * columns, D]."""
    read: Tensor | None = None
    """[G, all, D], of methods that act inside the language model: every visual token that it read at first, those that have
    gone since included. All other fields are of those that are still there. None for other methods."""

    @property
    def saliency(self) -> Tensor:
        """[G, N] float32 of the layer that the projector reads; of methods that need SALIENCY."""
        return self.signals[SALIENCY]

    @property
    def text(self) -> Words:
        """The words; of methods that need WORDS."""
        assert self.words is not None
        return self.words

    def copy(self) -> "VisualTokens":
        """The same in memory of its own."""
        return replace(
            self,
            features=self.features.clone(),
            candidates=self.candidates.clone(),
            source=self.source.clone(),
            signals={signal: values.clone() for signal, values in self.signals.items()},
            words=None if self.words is None else self.words.copy(),
            read=None if self.read is None else self.read.clone(),
        )


@dataclass(frozen=True)
class Plan:
    """What a method intends with an image, decided on the host before the tower runs."""

    keep: int | None
    """K, the number of tokens that stay. None: after the scores; the engine then asks `Method.count`."""
    grid: tuple[int, int] | None = None
    """(rows, columns) at which the tower is to see the image, in one crop; its tokens are the ones kept. None: as it is."""
    crops: tuple[int, ...] | None = None
    """The crops whose tokens may stay; None: all."""
    arranged: ImageLayout | None = None
    """The layout in which the tokens are to be fed to the method and to the language model; None: the model's own."""

    def allowed(self, layout: ImageLayout) -> int:
        """The number of tokens that may stay: all that show a patch of the crops in the plan, or the whole image."""
        if self.crops is None:
            return layout.tokens
        return int(layout.of_crops(self.crops).sum())


@dataclass(frozen=True)
class Cut:
    """Where inside the language model visual tokens of an image go, for a method of the stage "layers"."""

    layer: int
    """The first decoder layer that no longer sees them, counted from 0; 1 to the last."""
    keep: int
    """Tokens of the image that stay from this layer on."""
    rated: int
    """The decoder layer whose attention the method is shown: `layer` itself, whose queries and keys are made of all tokens
    that came so far, or the one in front of it."""


@dataclass(frozen=True)
class Kept:
    """What a method decided; the leading dimension is that of `VisualTokens`."""

    indices: Tensor
    """[G, K] long, ascending and distinct. For merged tokens: the token in whose place the merged one stands."""
    weights: Tensor | None = None
    """[G, K, N] float: each kept token is this mix of the tokens (a row of 0 and 1 keeps one as it is); None: the tokens at
    `indices` as they are. As weights rather than features, so that an engine mixes alike whatever belongs to a token: its
    features, the rows that it adds to layers of the language model ("deepstack"), on every worker. They mix what the
    language model reads, or what the projector reads: see `Method.mixes`."""
    text_attention: Tensor | None = None
    """[G, N] float32, how much each token has to do with the text, where the method computed it; for pictures."""
    objective: Tensor | None = None
    """[G] geometric mean of the kept set, where the method maximises it."""
    certificate: Tensor | None = None
    """[G] share by which the objective may fall short of the best set of K tokens, where it is known."""

    def copy(self) -> "Kept":
        """The same in memory of its own."""
        optional = (self.weights, self.text_attention, self.objective, self.certificate)
        return Kept(self.indices.clone(), *(None if values is None else values.clone() for values in optional))
