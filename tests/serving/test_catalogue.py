"""Every method of the catalogue that vLLM serves keeps there what it keeps in transformers, and the answers are the same.

Nothing here names a method, so a new one is covered by being there. An engine takes long to start and has one method, so one
is started whose tower is read for all of them, and its settings are changed between tests, in processor and model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from both import Both
from engines import picture

from adafv import Pruner
from adafv.core import ImageLayout, top_tokens
from adafv.core.tokens import SALIENCY, Kept, Plan, Signal, VisualTokens
from adafv.engines.serving.settings import ServerSettings
from adafv.engines.vllm.processor import PrunedInfo
from adafv.errors import AdaFVError, MethodError
from adafv.methods import Method, found_methods, known_methods


def settings_of(name: str) -> ServerSettings | None:
    """Of a server with this method; None where vLLM does not serve it."""
    try:
        return ServerSettings.of({"keep": 16, "method": name})
    except AdaFVError:
        return None


CROPS = ImageLayout(torch.arange(5 * 16), 5, 4, 4, (2, 2))
"""A thumbnail and four crops."""
SERVED = {name: settings for name in known_methods() if (settings := settings_of(name)) is not None}
REFUSED = sorted(known_methods().keys() - SERVED.keys())


@dataclass(frozen=True)
class Everything(Method):
    """Reads all that any of them needs."""

    name = "everything"
    summary = "reads all that there is to read"
    needs: ClassVar[frozenset[Signal]] = frozenset({SALIENCY}).union(
        *(each.method.needs | each.method.of_tower for each in SERVED.values())
    )

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return Kept(top_tokens(tokens.saliency, keep, tokens.candidates))


@dataclass
class Server:
    """An engine whose method changes."""

    both: Both
    current: list[ServerSettings] = field(default_factory=list)

    def now(self, name: str) -> None:
        settings = SERVED[name]
        self.current[:] = [settings]

        def change(model: Any) -> None:
            assert settings.method.of_tower | settings.method_without_text.of_tower <= model.adafv_signals
            model.adafv = settings

        self.both.llm.apply_model(change)


@pytest.fixture(scope="module")
def server(checkpoints: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(found_methods().classes, Everything.name, Everything)
        found = Server(Both.of("llava-next", checkpoints, {"keep": 16, "method": Everything.name}))
        found.current.append(ServerSettings.of({"keep": 16, "method": Everything.name}))
        patch.setattr(PrunedInfo, "settings", property(lambda _: found.current[0]))
        yield found


@pytest.mark.parametrize("name", SERVED)
def test_as_in_transformers(name: str, server: Server) -> None:
    """Crops and newlines, two images in one prompt, a number of tokens and a share."""
    content = [picture("bird").resize((500, 260)), "What color is the banana?", picture("key"), "Is there a key?"]
    try:
        SERVED[name].plan(CROPS, SERVED[name].budget, words=True)
        server.both.in_transformers(content, Pruner(name, 12, processor=server.both.processor))
    except AdaFVError as refused:
        pytest.skip(f"refused, see the tests of refusals: {refused}")
    server.now(name)
    for shown, keep in ((content, 12), (content[:2], 0.3)):
        server.both.agree_unless(partial(rounding_decides, server.both, shown, keep, name), shown, keep, name)


def rounding_decides(
    both: Both, content: list[Any], keep: int | float, name: str, kept: list[list[int]], chosen: list[list[int]]
) -> bool:
    """Whether the engines differ no more than transformers does from itself with noise of 1e-6 on what the tower says.

    The engines' kernels round differently. One method (VisPruner) compares neighbours in a list that each round makes anew,
    so a pair of like tokens decides about many.
    """
    least = [len(each) for each in kept]
    for seed in range(8):
        pruner = Pruner(Noisy(SERVED[name].method, seed), keep, processor=both.processor)
        noisy = both.in_transformers(content, pruner)[0]
        least = [min(most, len(set(a) & set(b))) for most, a, b in zip(least, noisy, kept, strict=True)]
    same = [len(set(a) & set(b)) for a, b in zip(chosen, kept, strict=True)]
    return all(a >= b for a, b in zip(same, least, strict=True))


@dataclass(frozen=True)
class Noisy(Method):
    """A method that is shown the signals of the tower with noise."""

    method: Method
    seed: int

    name = "noisy"
    summary = "another method, shown noise"

    @property
    def needs(self) -> frozenset[Signal]:  # type: ignore[override]
        return self.method.needs

    @property
    def mixes(self) -> str:  # type: ignore[override]
        return self.method.mixes

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        return self.method.plan(layout, keep)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        noise = torch.Generator().manual_seed(self.seed)
        signals = {
            signal: values * (1 + 1e-6 * torch.randn(values.shape, generator=noise))
            for signal, values in tokens.signals.items()
        }
        return self.method.select(replace(tokens, signals=signals), keep)


def test_the_others_are_refused() -> None:
    for name in REFUSED:
        with pytest.raises(MethodError, match=f"the method {name} .*use another method"):
            ServerSettings.of({"keep": 16, "method": name})
