"""Which layer of a vision tower a signal speaks of, and whether the tower can say it."""

from collections.abc import Sequence
from dataclasses import dataclass

from adafv.core.tokens import READ, Signal


@dataclass(frozen=True)
class TowerLayers:
    """The layers of one tower, counted as `vision_feature_layer` counts hidden states: 1 is the output of the first."""

    count: int
    deepest: int
    """The deepest layer that the projector reads; layers behind it are not run."""
    whole: Sequence[int] | None = None
    """Layers that look at the whole image, where others attend in windows; None: all do."""

    def unreadable(self, signal: Signal) -> str | None:
        """Why the signal cannot be read off this tower, and the mend; None: it can."""
        index, _ = self.place(signal)
        run = f"ask for one of 1 to {self.deepest}"
        if not 0 <= index <= self.count:
            return f"the tower has {self.count} layers; {run}"
        if index > self.deepest:
            return f"the projector reads layer {self.deepest}, and no layer behind it is run; {run}"
        if signal.kind in ("hidden", "read"):
            return None
        if index == 0:
            return f"0 stands for the embeddings, in front of any attention; {run}"
        if signal.kind == "saliency" and self.whole is not None and index not in self.whole:
            whole = ", ".join(map(str, self.whole))
            return f"the layer attends in windows; the layers that look at the whole image are {whole}"
        return None

    def place(self, signal: Signal) -> tuple[int, str]:
        """(hidden state, what to read there) of a signal.

        A signal without a number is of the layer that the projector reads (READ: its output). Its attention may be one in
        windows: saliency and keys are then those of the last layer in front of it that looks at the whole image.
        """
        if signal == READ:
            return self.deepest, "hidden"
        if signal.layer is not None:
            return signal.layer if signal.layer >= 0 else signal.layer + self.count + 1, signal.kind
        if signal.kind != "hidden" and self.whole is not None:
            return max(layer for layer in self.whole if layer <= self.deepest), signal.kind
        return self.deepest, signal.kind
