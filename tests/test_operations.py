"""What the hot path costs a device: operations, memory, and waiting for it. Counted, so that no stopwatch is needed."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adafv.core import (
    Selection,
    frank_wolfe_search,
    geometric_mean,
    joint_search,
    scores,
    split_search,
    text_to_image_attention,
)
from adafv.evaluation.speed.counting import Living, new_among, tensors_of

MOST_OPERATIONS = 64
"""Of scores and selection of a group of images, views left out: each is a launch on a GPU."""

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
"""What reads a value, or makes a tensor whose size depends on one: the host would wait for the device."""


class Watched(TorchDispatchMode):
    """Counts operations that make something new, tracks the bytes alive, and refuses those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []
        self.living = Living()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        if name == "index" or name == "index_put":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as index waits"
        out = func(*args, **(kwargs or {}))
        new = new_among(tensors_of(out), tensors_of((args, kwargs)))
        if new:
            self.made.append(name)
        for each in new:
            self.living.saw(each)
        return out


def test_the_watch_sees_what_it_counts() -> None:
    with Watched() as watch:
        held = torch.zeros(1000)
        view = held[:10]
        passing = held + 1
        del passing
    assert watch.made == ["zeros", "add"]
    assert (watch.living.bytes, watch.living.peak) == (4000, 8000)
    assert len(view) == 10
    for wait in (held[0].item, held.nonzero, lambda: bool(held[0]), lambda: held[held > 0]):
        with pytest.raises(AssertionError, match="waits"), Watched():
            wait()


def select(images: tuple[int, ...], tokens: int, keep: int, device: str, masks: bool) -> Selection:
    text = torch.empty(*images, 20, 64, dtype=torch.bfloat16, device=device)
    visual = torch.empty(*images, tokens, 64, dtype=torch.bfloat16, device=device)
    saliency = torch.empty(*images, tokens, device=device)
    counted = torch.empty(*images, 20, dtype=torch.bool, device=device) if masks else None
    shown = torch.empty(*images, tokens, dtype=torch.bool, device=device) if masks else None
    with Watched() as watch:
        found = joint_search(text_to_image_attention(text, visual, counted, shown), saliency, keep, shown)
    assert len(watch.made) <= MOST_OPERATIONS, watch.made
    return found


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("images", [(), (8,), (2, 3)])
@pytest.mark.parametrize(
    ("tokens", "keep"),
    [
        *[(576, keep) for keep in (1, 2, 3, 4, 58, 575, 576)],
        *[(tokens, keep) for tokens in (16, 2928, 16384) for keep in (2, 3)],
        *[(571, 570), (2928, 640), (16384, 4096)],
    ],
)
def test_scores_and_selection_take_few_operations(images: tuple[int, ...], tokens: int, keep: int, masks: bool) -> None:
    """On the path of a GPU. Tensors without values cannot be read: whatever asked for one would raise, too."""
    found = select(images, tokens, keep, "meta", masks)
    assert found.indices.shape == (*images, keep)
    assert found.objective.shape == found.certificate.shape == images


def test_few_operations_compute_the_same_text_attention() -> None:
    few = scores._text_attention_in_few_operations
    for masked in (False, True):
        text, visual = torch.randn(3, 6, 32), torch.randn(3, 600, 32)
        visual[0, 5] = 0.0
        text_mask, visual_mask = (torch.rand(3, size) < 0.7 if masked else None for size in (6, 600))
        if text_mask is not None and visual_mask is not None:
            text_mask[:, 0] = visual_mask[:, 0] = True
            text[~text_mask] = float("nan")
        expected = text_to_image_attention(text, visual, text_mask, visual_mask)
        torch.testing.assert_close(few(text, visual, text_mask, visual_mask, 100.0), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.pairs
@pytest.mark.parametrize("search", [joint_search, split_search])
@pytest.mark.parametrize("kind", ["independent", "alike", "opposite", "equal"])
@pytest.mark.parametrize("keep", [2, 3, 4096])
def test_memory_grows_with_the_tokens_alone(search: Any, kind: str, keep: int) -> None:
    """16,384 tokens, a quarter of them kept: what a long video has."""
    generator = torch.Generator().manual_seed(0)
    text, noise = torch.rand(2, 16_384, generator=generator)
    saliency = {"independent": noise, "alike": text, "opposite": 1 - text, "equal": torch.ones_like(text)}[kind]
    with Watched() as watch:
        search(text, saliency, keep)
    assert watch.living.peak < 64 * 2**20


@pytest.mark.parametrize("keep", [2, 3])
def test_memory_of_many_images_does_not_grow_with_their_sets(keep: int) -> None:
    """Of 64 frames of a video the sets are tried in blocks, with the same outcome."""
    text, saliency = torch.rand(2, 64, 144, generator=torch.Generator().manual_seed(0))
    with Watched() as watch:
        together = joint_search(text, saliency, keep)
    assert watch.living.peak < 64 * 2**20
    for image in (0, 15, 16, 63):
        alone = joint_search(text[image], saliency[image], keep)
        assert all(map(torch.equal, alone, (each[image] for each in together)))


def test_the_searches_agree_on_a_large_image() -> None:
    """Splits in blocks, and all at once in K^1.5 cells."""
    generator = torch.Generator().manual_seed(1)
    text, saliency = torch.randn(2, 4096, generator=generator).mul(2).exp()
    joint, split = joint_search(text, saliency, 1024), split_search(text, saliency, 1024)
    assert joint.objective >= split.objective * (1 - 1e-6)
    assert joint.objective >= frank_wolfe_search(text, saliency, 1024).objective * (1 - 1e-3)
    torch.testing.assert_close(joint.objective, geometric_mean(text, saliency, joint.indices))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("keep", [1, 2, 3, 58])
def test_nothing_waits_for_a_gpu(keep: int) -> None:
    text = torch.randn(4, 20, 64, device="cuda", dtype=torch.bfloat16)
    visual = torch.randn(4, 576, 64, device="cuda", dtype=torch.bfloat16)
    saliency = torch.rand(4, 576, device="cuda")
    shown = saliency > 0.1
    counted = torch.ones(4, 20, dtype=torch.bool, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = joint_search(text_to_image_attention(text, visual, counted, shown), saliency, keep, shown)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert (found.indices.diff(dim=-1) > 0).all()
    attention = text_to_image_attention(text, visual, counted, shown)
    there = joint_search(attention.cpu(), saliency.cpu(), keep, shown.cpu())
    torch.testing.assert_close(found.objective.cpu(), there.objective, rtol=1e-4, atol=0)
