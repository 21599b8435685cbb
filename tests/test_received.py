"""Saliency without [CLS]: the formulas written out, and what must hold for any queries, keys and values."""

from typing import Any

import pytest
import torch
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st

from adafv.core.received import patch_saliency, received_attention, sinks

Layer = dict[str, Any]


def a_layer(seed: int, patches: int, heads: int = 3, width: int = 8, batch: tuple[int, ...] = ()) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(*batch, heads, patches, width, generator=generator) * 2 for _ in range(3))
    features = torch.randn(*batch, patches, heads * width, generator=generator)
    return {"query": query, "key": key, "value": value, "features": features, "scaling": width**-0.5}


layers = st.builds(a_layer, st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 4))


def attended(layer: Layer) -> tuple[torch.Tensor, torch.Tensor, float]:
    return layer["query"], layer["key"], layer["scaling"]


def taken(layer: Layer, order: torch.Tensor) -> Layer:
    """The layer with its patches in another order."""
    return {name: part if name == "scaling" else part[..., order, :] for name, part in layer.items()}


@given(layers)
@examples(60)
def test_received_equals_the_formula_and_sums_to_one(layer: Layer) -> None:
    query, key, scaling = attended(layer)
    naive = (query @ key.transpose(-1, -2) * scaling).softmax(-1).mean(-2)
    found = received_attention(query, key, scaling)
    torch.testing.assert_close(found, naive)
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))


@given(layers, st.data())
@examples(60)
def test_ignored_patches_might_as_well_not_be_there(layer: Layer, data: st.DataObject) -> None:
    patches = layer["query"].shape[-2]
    stays = torch.tensor(data.draw(st.lists(st.booleans(), min_size=patches, max_size=patches)))
    stays[data.draw(st.integers(0, patches - 1))] = True
    order = stays.nonzero()[:, 0]
    received = received_attention(*attended(layer), ignored=~stays)
    torch.testing.assert_close(received[..., order], received_attention(*attended(taken(layer, order))))
    assert (received[..., ~stays] == 0).all()
    saliency = patch_saliency(**layer, ignored=~stays)
    torch.testing.assert_close(saliency[..., order], patch_saliency(**taken(layer, order)))
    assert (saliency[..., ~stays] == 0).all()


@given(layers, st.integers(1, 50))
@examples(60)
def test_the_size_of_the_blocks_does_not_matter(layer: Layer, rows: int) -> None:
    torch.testing.assert_close(
        received_attention(*attended(layer), rows=rows), received_attention(*attended(layer), rows=1000)
    )


@given(layers, st.randoms(use_true_random=False))
@examples(60)
def test_the_order_of_the_patches_does_not_matter(layer: Layer, random: Any) -> None:
    order = list(range(layer["query"].shape[-2]))
    random.shuffle(order)
    moved = patch_saliency(**taken(layer, torch.tensor(order)))
    torch.testing.assert_close(moved, patch_saliency(**layer)[torch.tensor(order)])


@given(layers)
@examples(60)
def test_saliency_is_received_times_squared_deviation(layer: Layer) -> None:
    stays = ~sinks(layer["features"])
    rest = taken(layer, stays.nonzero()[:, 0])
    attention = (rest["query"] @ rest["key"].transpose(-1, -2) * rest["scaling"]).softmax(-1)
    apart = (rest["value"] - rest["value"].mean(-2, keepdim=True)).square().sum(-1)
    naive = (attention.mean(-2) * apart).mean(-2)
    found = patch_saliency(**layer)
    torch.testing.assert_close(found[stays], naive / naive.sum().clamp_min(1e-30))
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(1, abs=1e-5) or stays.sum() == 1


@given(layers, st.floats(0.1, 10), st.floats(-5, 5))
@examples(60)
def test_saliency_does_not_depend_on_the_scale_or_the_middle_of_the_values(
    layer: Layer, scale: float, shift: float
) -> None:
    moved = {**layer, "value": layer["value"] * scale + shift}
    torch.testing.assert_close(patch_saliency(**moved), patch_saliency(**layer), rtol=1e-3, atol=1e-5)


def test_a_batch_is_its_images_one_by_one() -> None:
    layer = a_layer(0, 30, batch=(2, 3))
    found = patch_saliency(**layer, rows=7)
    for place in ((0, 0), (0, 2), (1, 1)):
        alone = {name: part if name == "scaling" else part[place] for name, part in layer.items()}
        torch.testing.assert_close(found[place], patch_saliency(**alone))


def test_half_precision_is_computed_in_float32() -> None:
    layer = a_layer(1, 50)
    half = {name: part if name == "scaling" else part.bfloat16() for name, part in layer.items()}
    rounded = {name: part if name == "scaling" else part.float() for name, part in half.items()}
    found = patch_saliency(**half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, patch_saliency(**rounded))


def test_sinks_are_found_and_get_nothing() -> None:
    layer = a_layer(2, 100)
    layer["features"][..., [0, 9], :] *= 30
    layer["key"][..., 0, :] = layer["query"].mean(-2) * 20  # and one of them is looked at by all
    assert sinks(layer["features"]).nonzero()[:, 0].tolist() == [0, 9]
    assert patch_saliency(**layer)[[0, 9]].tolist() == [0, 0]


@pytest.mark.parametrize("patches", [1, 2, 3])
def test_small_pictures_keep_a_patch_and_stay_finite(patches: int) -> None:
    layer = a_layer(3, patches)
    layer["features"][..., 0, :] *= 1000
    assert not sinks(layer["features"]).all()
    assert patch_saliency(**layer).isfinite().all()


def test_no_block_is_larger_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    softmax = torch.Tensor.softmax

    def watched(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, self.numel())
        return softmax(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", watched)
    received_attention(*attended(a_layer(4, 90, heads=2, batch=(3,))), rows=12)
    assert largest == 12 * 90 * 2
