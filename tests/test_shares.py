"""A number of tokens for each image, counted after the scores: `facet` with a share of the worth."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, make_inputs
from sharing import shared_model

from adafv import compress
from adafv.core.facets import fewest
from adafv.core.tokens import SALIENCY, VisualTokens, Words
from adafv.engines.serving.settings import ServerSettings
from adafv.errors import MethodError, OptionError
from adafv.methods.options import method_of

[LLAVA] = [row for row in FAMILIES if row.name == "llava"]


@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_fewest_tokens_hold_the_share(seed: int, tokens: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    worth = torch.rand(3, tokens, generator=generator) + 0.05
    candidates = torch.rand(3, tokens, generator=generator) < 0.8
    for found, row, shown in zip(fewest(worth, share, candidates).tolist(), worth, candidates, strict=True):
        squares = sorted((float(value) ** 2 for value in row[shown]), reverse=True)
        assert 1 <= found <= max(1, len(squares))
        assert sum(squares[:found]) >= share * sum(squares) * (1 - 1e-5)
        assert found == 1 or sum(squares[: found - 1]) < share * sum(squares) * (1 + 1e-5)


def kept_of(model: Any, inputs: Any, keep: int | float, share: float) -> list[list[int]]:
    record = compress(model, inputs, keep, method="facet", share=share).record
    return [kept.tolist() for kept in record.kept]


def test_every_image_of_a_batch_has_its_own_number() -> None:
    with shared_model(LLAVA) as model:
        inputs = make_inputs(LLAVA, model, [1, 1, 1])
        [most] = {len(kept) for kept in kept_of(model, inputs, 0.9, 1.0)}
        few, more = (kept_of(model, inputs, most, share) for share in (0.3, 0.6))
        assert all(1 <= len(one) < len(two) < most for one, two in zip(few, more, strict=True))
        assert len({len(kept) for kept in more}) > 1
        # The budget is a bound.
        assert [len(kept) for kept in kept_of(model, inputs, 2, 0.8)] == [2, 2, 2]
        # A number of its own is the same choice as that number for all.
        for place, kept in enumerate(few):
            assert kept_of(model, inputs, len(kept), 1.0)[place] == kept


def test_one_token_of_36_stays_at_least() -> None:
    tokens = VisualTokens(
        features=torch.eye(72)[None],
        candidates=torch.ones(1, 72, dtype=torch.bool),
        source=torch.arange(72)[None],
        crops=1,
        rows=8,
        columns=9,
        signals={SALIENCY: torch.ones(1, 72)},
        words=Words(torch.eye(72)[None, :1], torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1).long()),
    )
    assert [method_of("facet", {"share": 1e-6}).count(tokens, most).item() for most in (30, 1)] == [2, 1]


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_what_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(OptionError, match=r"share=.*give a number above 0, up to 1"):
        method_of("facet", {"share": share})


def test_a_server_cannot_count_after_the_tower() -> None:
    server = ServerSettings.of({"keep": 4, "method": "facet", "parameters": {"share": 0.5}})
    with shared_model(LLAVA) as model:
        layout = compress(model, make_inputs(LLAVA, model, [1]), 1.0).record.images[0].layout
    with pytest.raises(MethodError, match=r"facet counts its tokens after the tower.*use another method"):
        server.plan(layout, server.budget, words=True)
