"""The pure functions: properties, brute force on small images, and the published search to the letter."""

import itertools
import math
from typing import Any

import pytest
import torch
from drawn import examples
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from adafv.core import (
    class_attention,
    frank_wolfe_search,
    geometric_mean,
    joint_search,
    published_search,
    published_tokens,
    selection,
    split_search,
    text_to_image_attention,
    top_tokens,
)
from adafv.errors import BudgetError

SEARCHES = {"split": split_search, "joint": joint_search, "frank-wolfe": frank_wolfe_search}


def heavy_tailed(tokens: int, seed: int, batch: tuple[int, ...] = ()) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*batch, tokens, generator=generator).mul(2).exp()
    return scores / scores.sum(-1, keepdim=True)


scores = st.integers(1, 40).flatmap(
    lambda tokens: st.tuples(
        *[st.lists(st.floats(0, 1, width=32), min_size=tokens, max_size=tokens).map(torch.tensor) for _ in range(2)],
        st.integers(1, tokens),
    )
)


@given(scores)
@examples(200)
@pytest.mark.parametrize("search", SEARCHES)
def test_exactly_k_distinct_tokens_in_order(search: str, case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    text, saliency, keep = case
    found = SEARCHES[search](text, saliency, keep)
    assert found.indices.shape == (keep,)
    assert (found.indices.diff() > 0).all()
    assert found.indices.min() >= 0
    assert found.indices.max() < len(text)
    assert 0 <= found.certificate <= 1


@given(scores)
@example((torch.tensor([0.75]), torch.tensor([1.4013e-45]), 1))
@examples(200)
def test_joint_is_never_below_split(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    text, saliency, keep = case
    joint, split = (search(text, saliency, keep) for search in (joint_search, split_search))
    found, least = (mass(text, each.indices) * mass(saliency, each.indices) for each in (joint, split))
    assert found >= least * (1 - 1e-6)
    # A product of masses below the smallest normal number has a few bits, so the same set's objective may be a fifth off.
    if least >= torch.finfo(torch.float32).tiny:
        assert joint.objective >= split.objective * (1 - 1e-6)


def mass(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return scores.double().gather(-1, chosen).sum(-1)


@pytest.mark.parametrize("kind", ["independent", "alike", "opposite", "tied", "peaked", "in-order"])
def test_joint_is_never_below_split_in_any_image_of_a_group(kind: str) -> None:
    """All K + 1 splits are among its candidates, also where the blocks that it finds them by do not come out even."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        tokens = int(torch.randint(4, 400, (), generator=generator))
        keep = int(torch.randint(4, tokens + 1, (), generator=generator))
        text, noise = torch.rand(2, 3, tokens, generator=generator)
        if kind == "tied":
            text, noise = text.mul(4).round(), noise.mul(4).round()
        if kind == "peaked":
            text, noise = text.mul(20).exp(), noise.mul(20).exp()
        if kind == "in-order":
            text = text.sort(dim=-1).values
        saliency = {"alike": text + noise / 10, "opposite": 1 - text}.get(kind, noise)
        candidates = torch.rand(3, tokens, generator=generator) < 0.8 if seed % 2 else None
        joint, split = (SEARCHES[name](text, saliency, keep, candidates) for name in ("joint", "split"))
        counted = torch.ones(3, tokens) if candidates is None else candidates.float()
        found, least = (
            mass(text * counted, each.indices) * mass(saliency * counted, each.indices) for each in (joint, split)
        )
        assert (found >= least * (1 - 1e-6)).all()
        torch.testing.assert_close(found.sqrt().float(), joint.objective)


def test_split_in_blocks_is_split_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text, saliency = heavy_tailed(90, 0, (2, 2)).mul(64).round(), heavy_tailed(90, 1, (2, 2)).mul(64).round()
    at_once = split_search(text, saliency, 31)
    monkeypatch.setattr(selection, "_BLOCK", 1000)
    assert torch.equal(split_search(text, saliency, 31).indices, at_once.indices)


@pytest.mark.parametrize(("tokens", "keep"), [(144, 7), (576, 29), (576, 58), (576, 144), (2880, 144)])
def test_joint_reaches_what_frank_wolfe_reaches(tokens: int, keep: int) -> None:
    text, saliency = heavy_tailed(tokens, 0, (64,)), heavy_tailed(tokens, 1, (64,))
    for other in (saliency, (text + saliency) / 2, 1e-3 / (text + 1e-3) + saliency):
        joint, before = joint_search(text, other, keep), frank_wolfe_search(text, other, keep)
        assert (joint.objective / before.objective).mean() > 0.999
        assert joint.certificate.median() < 0.01


def test_certificate_is_zero_where_nothing_is_left_to_choose() -> None:
    text, saliency = heavy_tailed(40, 0), heavy_tailed(40, 1)
    for chosen in (joint_search(text, text, 9), joint_search(text * 0, saliency * 0, 9)):
        assert chosen.certificate == 0
    assert joint_search(text, text, 9).indices.tolist() == top_tokens(text, 9).tolist()
    assert joint_search(text * 0, text * 0, 9).indices.tolist() == list(range(9))
    assert joint_search(text, saliency * 0, 9).indices.tolist() == top_tokens(text, 9).tolist()
    assert joint_search(text * 0, saliency, 9).indices.tolist() == top_tokens(saliency, 9).tolist()


def test_an_image_does_not_depend_on_its_group() -> None:
    """Bit by bit, also with equal scores."""
    text, saliency = heavy_tailed(300, 0, (9,)), heavy_tailed(300, 1, (9,))
    text[3:6], saliency[3:6] = text[3:6].mul(50).round(), saliency[3:6].mul(50).round()
    together = joint_search(text, saliency, 40)
    for image in range(9):
        alone = joint_search(text[image], saliency[image], 40)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other[image])


@given(st.integers(2, 10), st.data())
@examples(150)
def test_certificates_hold_against_brute_force(tokens: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, tokens))
    text, saliency = (heavy_tailed(tokens, data.draw(st.integers(0, 10_000))) for _ in range(2))
    best = max(
        float(geometric_mean(text, saliency, torch.tensor(choice)))
        for choice in itertools.combinations(range(tokens), keep)
    )
    for search in SEARCHES.values():
        found = search(text, saliency, keep)
        assert found.objective <= best + 1e-6
        assert best <= found.objective / (1 - found.certificate) + 1e-5


def test_joint_is_the_optimum_where_its_certificate_says_so() -> None:
    tight = 0
    for seed in range(100):
        text, saliency = heavy_tailed(10, seed), heavy_tailed(10, seed + 1000)
        best = max(
            float(geometric_mean(text, saliency, torch.tensor(choice)))
            for choice in itertools.combinations(range(10), 4)
        )
        found = joint_search(text, saliency, 4)
        assert found.objective >= (1 - found.certificate) * best * (1 - 1e-6)
        tight += bool(found.certificate < 1e-4)
    assert tight > 20  # of 100 small and lumpy images; of real ones nearly all


def best_of_all(text: torch.Tensor, saliency: torch.Tensor, keep: int) -> float:
    """Of every set, in double precision."""
    sets = torch.tensor(list(itertools.combinations(range(len(text)), keep)))
    return float((text.double()[sets].sum(-1) * saliency.double()[sets].sum(-1)).max().sqrt())


kinds = st.sampled_from(
    [
        st.floats(0, 1, width=32),
        st.sampled_from([0.0, 0.25, 0.5, 1.0]),  # ties and zeros
        st.floats(-12, 0).map(math.exp),  # heavy tails
        st.sampled_from([0.0, 1e-25, 1e-3, 1.0]),
        st.sampled_from([0.0, 1e-45, 3e-42, 1e-38]),  # subnormal
    ]
)
small = st.integers(1, 3).flatmap(
    lambda keep: st.tuples(
        st.just(keep),
        (st.just(keep + 1) | st.integers(keep, 14)).flatmap(
            lambda tokens: st.tuples(
                *[kinds.flatmap(lambda kind, n=tokens: st.lists(kind, min_size=n, max_size=n)) for _ in range(2)]
            )
        ),
    )
)


@given(small)
@examples(400)
def test_joint_is_the_best_of_all_sets_where_these_are_few(case: tuple[int, tuple[list[float], list[float]]]) -> None:
    keep, pair = case
    text, saliency = (torch.tensor(scores) for scores in pair)
    found, best = joint_search(text, saliency, keep), best_of_all(text, saliency, keep)
    assert float(found.objective) == pytest.approx(best, rel=2e-6, abs=1e-18)
    assert found.certificate == 0
    assert (found.indices.diff() > 0).all()


def first_of_the_best(
    text: torch.Tensor, saliency: torch.Tensor, keep: int, candidates: torch.Tensor | None = None
) -> list[int]:
    """Of all sets of candidates, in double precision; where one score is nothing everywhere, by the other."""
    among = range(len(text)) if candidates is None else candidates.nonzero().flatten().tolist()
    sets = torch.tensor(list(itertools.combinations(among, keep)))
    masses = [scores.double()[sets].sum(-1) for scores in (text, saliency)]
    product = masses[0] * masses[1]
    best = product == product.max()
    if product.max() == 0:
        best = masses[0] + masses[1] == (masses[0] + masses[1]).max()
    return sets[best][0].tolist()


@given(small, st.data())
@examples(300)
def test_of_equally_good_sets_the_one_with_the_lower_indices(
    case: tuple[int, tuple[list[float], list[float]]], data: st.DataObject
) -> None:
    """Also of two images side by side, and with candidates."""
    keep, pair = case
    text, saliency = (torch.tensor([scores, scores[::-1]]) for scores in pair)
    tokens = text.shape[1]
    masks = st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(lambda mask: sum(mask) >= keep)
    for candidates in (None, torch.tensor([data.draw(masks), data.draw(masks)])):
        found = joint_search(text, saliency, keep, candidates)
        for image in range(2):
            allowed = None if candidates is None else candidates[image]
            expected = first_of_the_best(text[image], saliency[image], keep, allowed)
            if keep > 1 or found.objective[image] > 0:
                assert found.indices[image].tolist() == expected


@pytest.mark.parametrize("keep", [2, 3])
def test_fewer_candidates_than_tokens_to_keep(keep: int) -> None:
    """All of them stay, and the first of the others; of many tokens and of few."""
    for tokens in (20, 600):
        text, saliency = heavy_tailed(tokens, 0), heavy_tailed(tokens, 1)
        for own in range(keep + 1):
            candidates = torch.zeros(tokens, dtype=torch.bool)
            candidates[list(range(5, 5 + own))] = True
            found = joint_search(text, saliency, keep, candidates)
            assert found.indices.tolist() == sorted([*range(5, 5 + own), *range(keep - own)])
            assert found.certificate == 0


@pytest.mark.parametrize(("keep", "tokens"), [(1, 90), (2, 400), (3, 90)])
def test_joint_is_the_best_of_all_sets_of_real_images(keep: int, tokens: int) -> None:
    """More than are tried; scores as peaked as attention, alike, independent and opposite."""
    assert keep == 1 or selection.SEARCHED_TOKENS[keep] < tokens
    for seed in range(4):
        text, noise = heavy_tailed(tokens, seed), heavy_tailed(tokens, seed + 100)
        for saliency in (noise, text * noise, 1e-4 / (text + 1e-4) + noise):
            found = joint_search(text, saliency, keep)
            assert float(found.objective) == pytest.approx(best_of_all(text, saliency, keep), rel=2e-6)
            assert found.certificate == 0


def test_a_single_token_is_that_of_the_largest_product() -> None:
    """Heads of neither list, it is in no split and no vertex of the relaxation."""
    text, saliency = torch.tensor([1.0, 0.0, 0.4, 0.4, 0.1]), torch.tensor([0.0, 1.0, 0.4, 0.4, 0.1])
    assert joint_search(text, saliency, 1).indices.tolist() == [2]  # of equals, the lower index
    assert joint_search(text, saliency, 1, torch.tensor([True, True, False, False, True])).indices.tolist() == [4]
    assert joint_search(text * 1e-30, saliency * 1e-30, 1).indices.tolist() == [
        2
    ]  # whose product float32 does not hold


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_few_tokens_of_images_side_by_side(keep: int) -> None:
    text, saliency = heavy_tailed(60, 0, (2, 3)), heavy_tailed(60, 1, (2, 3))
    text[0, 1], saliency[1, 2] = 0.0, 0.25  # nothing at all, and all the same
    candidates = torch.arange(60).expand(2, 3, 60) % 5 != 3
    for allowed in (None, candidates):
        together = joint_search(text, saliency, keep, allowed)
        for place in itertools.product(range(2), range(3)):
            alone = joint_search(text[place], saliency[place], keep, None if allowed is None else allowed[place])
            assert torch.equal(together.indices[place], alone.indices)
            if allowed is not None:
                assert allowed[place][alone.indices].all()
                chosen = allowed[place].nonzero().flatten()
                best = best_of_all(text[place][chosen], saliency[place][chosen], keep)
                assert float(alone.objective) == pytest.approx(best, rel=2e-6)


@given(small, st.integers(6, 8), st.sampled_from(["joint", "frank-wolfe"]))
@examples(300)
def test_the_certificate_holds_where_not_all_sets_are_tried(
    case: tuple[int, tuple[list[float], list[float]]], tried: int, search: str
) -> None:
    keep, pair = case
    text, saliency = (torch.tensor(scores) for scores in pair)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "SEARCHED_TOKENS", {2: tried, 3: tried})
        patch.setattr(selection, "_SEARCHED_BEFORE", {2: tried - 3, 3: tried - 3})
        found = SEARCHES[search](text, saliency, keep)
    split = split_search(text, saliency, keep)
    least, reached = (mass(text, each.indices) * mass(saliency, each.indices) for each in (split, found))
    assert reached >= least * (1 - 2e-6)
    best = best_of_all(text, saliency, keep)
    assert best * (1 - float(found.certificate)) <= float(found.objective) * (1 + 2e-6) + 1e-18


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_nothing_waits_for_the_device(keep: int) -> None:
    """Tensors without values cannot be read: whatever asked for one would raise."""
    text, saliency = (torch.empty(2, 600, device="meta") for _ in range(2))
    for candidates in (None, text > 0):
        assert joint_search(text, saliency, keep, candidates).indices.shape == (2, keep)


@pytest.mark.parametrize("keep", [2, 3])
def test_scores_that_are_opposite_everywhere(keep: int) -> None:
    """The worst there is: nothing can be ruled out. What is said of the tokens that were not tried holds all the same."""
    for tokens, most in ((576, 0.025), (2928, 0.05)):
        text = torch.rand(8, tokens, generator=torch.Generator().manual_seed(0))
        found = joint_search(text, 1 - text, keep)
        assert (found.objective / (1 - found.certificate) >= keep / 2 * (1 - 1e-4)).all()
        assert (found.certificate > 0).all()
        assert (found.certificate < most).all()


@pytest.mark.parametrize("keep", [2, 3])
def test_devices_that_are_not_read_keep_the_same_tokens(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There Frank-Wolfe's sets of few tokens are as many as could be left, not as many as are."""
    text, saliency = heavy_tailed(500, 0, (4,)), heavy_tailed(500, 1, (4,))
    text[0], saliency[0], text[1], saliency[1] = 0.5, 0.5, text[1].round(decimals=2), saliency[1].round(decimals=2)
    read = frank_wolfe_search(text, saliency, keep)
    monkeypatch.setattr(selection, "_is_on_host", lambda values: False)
    unread = frank_wolfe_search(text, saliency, keep)
    assert torch.equal(read.indices, unread.indices)
    assert torch.equal(read.certificate, unread.certificate)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return made


@pytest.mark.parametrize("search", ["joint", "frank-wolfe"])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_memory_of_a_group_of_the_largest_images(keep: int, search: str) -> None:
    """16,384 tokens: never tokens x tokens, also where scores are opposite and nothing can be ruled out soon."""
    for images, opposite in ((8, False), (1, True)):
        text, saliency = heavy_tailed(16_384, 0, (images,)), heavy_tailed(16_384, 1, (images,))
        if opposite:
            saliency = text.amax(-1, keepdim=True) - text
        with Largest() as largest:
            SEARCHES[search](text, saliency, keep)
        # a number per weight and token, or two per split and token, with which Frank-Wolfe begins
        each = selection.WEIGHTS if search == "joint" else (keep + 1) * 2
        assert largest.elements <= max(images * 16_384 * each, 2**21)


@pytest.mark.parametrize(("tokens", "keep"), [(576, 29), (576, 58), (576, 144), (2880, 29), (2880, 144)])
def test_certificate_is_below_one_percent_in_the_median(tokens: int, keep: int) -> None:
    found = joint_search(heavy_tailed(tokens, 0, (64,)), heavy_tailed(tokens, 1, (64,)), keep)
    assert found.certificate.median() < 0.01


@given(scores)
@examples(100)
def test_scale_of_either_score_does_not_matter(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    text, saliency, keep = case
    text, saliency = text.clamp_min(1e-3), saliency.clamp_min(1e-3)
    one = joint_search(text, saliency, keep)
    two = joint_search(text * 64, saliency / 64, keep)  # powers of two: exact in floating point
    torch.testing.assert_close(one.objective, two.objective, rtol=1e-5, atol=0)


@pytest.mark.parametrize("search", SEARCHES)
def test_batches_are_rows_side_by_side(search: str) -> None:
    text, saliency = heavy_tailed(60, 0, (2, 3)), heavy_tailed(60, 1, (2, 3))
    together = SEARCHES[search](text, saliency, 9)
    for place in itertools.product(range(2), range(3)):
        alone = SEARCHES[search](text[place], saliency[place], 9)
        assert torch.equal(together.indices[place], alone.indices)
        torch.testing.assert_close(together.objective[place], alone.objective)


@pytest.mark.parametrize("search", SEARCHES)
def test_other_candidates_come_last(search: str) -> None:
    text, saliency = heavy_tailed(20, 0), heavy_tailed(20, 1)
    candidates = torch.arange(20) % 4 != 3
    text[3], saliency[7] = 10.0, float("nan")  # what is no candidate must not matter
    found = SEARCHES[search](text, saliency, 15, candidates)
    assert torch.equal(found.indices, candidates.nonzero().flatten())
    found = SEARCHES[search](text, saliency, 17, candidates)
    assert set(candidates.nonzero().flatten().tolist()) < set(found.indices.tolist())
    assert torch.equal(SEARCHES[search](text, saliency, 20, candidates).indices, torch.arange(20))


def test_split_by_hand() -> None:
    """Token 0 heads both lists. k1 = 1, k2 = 1 then leaves one place, which goes to the next on the saliency list."""
    text, saliency = torch.tensor([0.6, 0.3, 0.1, 0.0]), torch.tensor([0.5, 0.1, 0.0, 0.4])
    found = split_search(text, saliency, 2)
    # {0, 3}: 0.6 * 0.9; {0, 1}: 0.9 * 0.6. Equal: the smaller k1 wins, that is the pick from the saliency list.
    assert found.indices.tolist() == [0, 3]
    assert found.objective == pytest.approx(math.sqrt(0.54))


def published_reference(text: torch.Tensor, saliency: torch.Tensor, keep: int) -> list[int]:
    """The published selection, spelled out in plain Python from its description."""
    crops, patches = saliency.shape
    total = 2 * (keep // 2 // crops) * crops
    text_list = sorted(range(crops * patches), key=lambda j: -text[j])[:total]
    saliency_list = []
    for crop in range(crops):
        best = sorted(range(patches), key=lambda j: -saliency[crop, j])[: total // crops]
        saliency_list += [(float(saliency[crop, j]), j + crop) for j in best]
    floor = int(total * 0.25)
    head = [j for _, j in saliency_list[:floor]]
    tail = sorted(saliency_list[floor:], key=lambda pair: -pair[0])
    searched = total - 2 * floor
    value, split = -1.0, 0
    for first in range(searched + 1):
        product = sum(float(text[j]) for j in text_list[floor : floor + first])
        product *= sum(score for score, _ in tail[: searched - first])
        if product > value + 1e-12:
            value, split = product, first
    return sorted(text_list[: floor + split] + head + [j for _, j in tail[: searched - split]])


@pytest.mark.parametrize(
    ("crops", "patches", "keep"), [(1, 40, 10), (1, 576, 58), (5, 30, 29), (5, 576, 144), (3, 20, 60)]
)
def test_published_search_to_the_letter(crops: int, patches: int, keep: int) -> None:
    for seed in range(5):
        text, saliency = heavy_tailed(crops * patches, seed), heavy_tailed(patches, seed + 50, (crops,))
        found = published_search(text.double(), saliency.double(), keep)
        assert found.tolist() == published_reference(text.double(), saliency.double(), keep)
        assert len(found) == published_tokens(keep, crops)


def test_published_search_shows_its_bugs() -> None:
    assert [published_tokens(144, 5), published_tokens(29, 1), published_tokens(58, 1)] == [140, 28, 58]
    text, saliency = heavy_tailed(5 * 576, 0), heavy_tailed(576, 1, (5,))
    found = published_search(text, saliency, 144)
    saliency_only = set(found.tolist()) - set(text.topk(140).indices.tolist())
    assert max(saliency_only) < 580  # every saliency pick lands on the thumbnail
    shared = heavy_tailed(100, 3)
    assert len(set(published_search(shared, shared[None], 20).tolist())) < 20  # paid twice


def test_published_search_refuses_what_it_cannot_do() -> None:
    for keep in (1, 9):
        with pytest.raises(BudgetError):
            published_search(heavy_tailed(50, 0), heavy_tailed(10, 0, (5,)), keep)


# ------------------------------------------------------------------------------------------------ scores


def test_class_attention_is_the_first_row_of_softmax() -> None:
    query, key = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
    expected = ((query @ key.transpose(-1, -2)) * 0.3).softmax(-1)[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(class_attention(query, key, 0.3), expected)
    torch.testing.assert_close(class_attention(query[:, :, :1], key, 0.3), expected)


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 1000))
@examples(60)
def test_text_attention_by_its_definition(words: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    text, visual = torch.randn(words, 6, generator=generator), torch.randn(tokens, 6, generator=generator)
    expected = [
        max(
            math.exp(100 * float(torch.cosine_similarity(word, token, dim=0)))
            / sum(math.exp(100 * float(torch.cosine_similarity(word, other, dim=0))) for other in visual)
            for word in text
        )
        for token in visual
    ]
    torch.testing.assert_close(text_to_image_attention(text, visual), torch.tensor(expected), rtol=1e-3, atol=1e-5)


def test_text_attention_ignores_what_is_masked() -> None:
    text, visual = torch.randn(2, 4, 6), torch.randn(2, 9, 6)
    text_mask, visual_mask = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    text_mask[0, 2:] = visual_mask[1, :4] = False
    found = text_to_image_attention(text, visual, text_mask, visual_mask)
    torch.testing.assert_close(found[0], text_to_image_attention(text[0, :2], visual[0]))
    torch.testing.assert_close(found[1, 4:], text_to_image_attention(text[1], visual[1, 4:]))
    assert (found[1, :4] == 0).all()


def test_half_precision_inputs_are_scored_in_float32() -> None:
    text, visual = torch.randn(4, 16).bfloat16(), torch.randn(30, 16).bfloat16()
    found = text_to_image_attention(text, visual)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, text_to_image_attention(text.float(), visual.float()))


@pytest.mark.parametrize(
    "scores",
    [
        torch.tensor([9.0, float("-inf"), 1.0, float("-inf"), 9.0]),
        torch.tensor([True, False, True, False, True]),
        torch.tensor([9, -5, 1, -5, 9]),
        torch.tensor([9.0, float("-inf"), 1.0, float("-inf"), 9.0]).half(),
    ],
    ids=lambda scores: str(scores.dtype),
)
def test_top_tokens_of_candidates_that_score_nothing(scores: torch.Tensor) -> None:
    """As where a method leaves out duplicates by -inf: newlines still come last."""
    candidates = torch.tensor([False, True, True, True, False])
    expected = [[2], [1, 2], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert [top_tokens(scores, keep, candidates).tolist() for keep in range(1, 6)] == expected


def test_top_tokens() -> None:
    values = torch.tensor([1.0, 5.0, 5.0, 2.0])
    assert top_tokens(values, 1).tolist() == [1]  # of equals, the lower index
    assert top_tokens(values, 3).tolist() == [1, 2, 3]
    assert top_tokens(values, 2, torch.tensor([True, False, False, True])).tolist() == [0, 3]


@pytest.mark.parametrize("keep", [0, 11])
@pytest.mark.parametrize("search", SEARCHES)
def test_searches_check_the_budget(search: str, keep: int) -> None:
    with pytest.raises(BudgetError):
        SEARCHES[search](heavy_tailed(10, 0), heavy_tailed(10, 1), keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saliency_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """Rounding would decide ties between tokens."""
    query, key = (torch.randn(4, 65, 16, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    assert torch.equal(class_attention(query, key, 0.25), class_attention(query.float(), key.float(), 0.25))


def test_top_tokens_of_whole_numbers_too_large_for_float32() -> None:
    scores = torch.tensor([2**24, 2**24 + 1, 3, 2**24 + 2])
    candidates = torch.tensor([True, True, True, False])
    assert [top_tokens(scores, keep, candidates).tolist() for keep in (1, 2, 4)] == [[1], [0, 1], [0, 1, 2, 3]]
