"""The cache of encoded images: bounded, the least recently used one goes, and what it gives back is what was put."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.encoded import EncodedImage, TowerCache
from adafv.core.tokens import KEYS, SALIENCY

CAPACITY = 100
LAYOUT = ImageLayout(torch.arange(1), crops=1, rows=1, columns=1)


def image(size: int, saliency: Tensor | None = None) -> EncodedImage:
    """Of so many bytes."""
    signals = {} if saliency is None else {SALIENCY: saliency}
    return EncodedImage(torch.zeros(size, 1, dtype=torch.uint8), signals, LAYOUT)


@given(st.lists(st.tuples(st.sampled_from(["get", "put"]), st.integers(0, 6), st.integers(0, 120))))
def test_it_is_what_a_list_would_be(steps: list[tuple[str, int, int]]) -> None:
    cache = TowerCache(CAPACITY)
    model: list[tuple[bytes, EncodedImage]] = []  # the least recently used one first
    for step, number, size in steps:
        name = bytes([number])
        known = [entry for entry in model if entry[0] == name]
        if step == "get":
            assert cache.get(name) is (known[0][1] if known else None)
            model = [entry for entry in model if entry[0] != name] + known
        else:
            new = image(size)
            cache.put(name, new)
            model = [entry for entry in model if entry[0] != name]
            if size <= CAPACITY:
                model.append((name, new))
                while sum(each.bytes for _, each in model) > CAPACITY:
                    del model[0]
        assert len(cache) == len(model)
        assert cache.bytes == sum(each.bytes for _, each in model) <= CAPACITY
    assert all(cache.get(name) is each for name, each in model)


def test_all_that_an_image_holds_counts() -> None:
    assert image(8, torch.zeros(3)).bytes == 8 + 3 * 4
    features = torch.zeros(5, 7, dtype=torch.bfloat16)
    assert EncodedImage(features, {}, LAYOUT).bytes == 70
    keys = torch.zeros(5, 2, 3, dtype=torch.bfloat16)
    assert EncodedImage(features, {KEYS: keys}, LAYOUT, torch.zeros(5, 2, 7)).bytes == 70 + 60 + 280


@pytest.mark.parametrize("size", [1, 1000])
def test_a_cache_of_no_size_keeps_nothing(size: int) -> None:
    cache = TowerCache(0)
    cache.put(b"name", image(size))
    assert cache.get(b"name") is None
    assert (len(cache), cache.bytes) == (0, 0)


def test_forgetting_all() -> None:
    cache = TowerCache(CAPACITY)
    cache.put(b"name", image(10))
    cache.clear()
    assert cache.get(b"name") is None
    assert (len(cache), cache.bytes) == (0, 0)


def test_too_large_an_image_takes_nobodys_place() -> None:
    cache = TowerCache(CAPACITY)
    cache.put(b"small", image(10))
    cache.put(b"large", image(CAPACITY + 1))
    assert cache.get(b"small") is not None
    assert cache.get(b"large") is None
