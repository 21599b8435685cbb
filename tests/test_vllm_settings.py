"""The options of a vLLM server and of its requests: what is accepted means what it says, and the rest is refused."""

import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from adafv.core.budget import MOST_TOKENS, Budget
from adafv.core.crops import Crops
from adafv.core.layout import ImageLayout
from adafv.core.tokens import SALIENCY
from adafv.engines.serving.settings import ServerSettings
from adafv.errors import BudgetError, OptionError

COUNTS = st.integers(1, MOST_TOKENS)
SHARES = st.floats(0.0, 1.0, exclude_min=True)
BAD_KEEPS = [
    0,
    -1,
    0.0,
    -0.1,
    1.5,
    64.0,
    math.nan,
    math.inf,
    True,
    False,
    "many",
    "64 tokens",
    " 10%",
    b"1",
    None,
    [3],
    {},
    2**31,
    2**70,
    10**400,
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def server(**options: Any) -> ServerSettings:
    return ServerSettings.of({"keep": 64} | options)


@pytest.mark.parametrize("keep", BAD_KEEPS, ids=lambda keep: str(keep)[:8])
def test_a_bad_budget_is_refused_wherever_it_stands(keep: Any) -> None:
    for ask in (lambda: server(keep=keep), lambda: server().asked({"keep": keep})):
        with pytest.raises(BudgetError, match=r"^keep"):
            ask()
    with pytest.raises(BudgetError, match=r"^max_keep="):
        server(max_keep=keep)


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (None, "hf-overrides"),
        ("64", "hf-overrides"),
        ([64], "hf-overrides"),
        ({}, "keep is missing"),
        ({"method": "adafv"}, "keep is missing"),
        ({"kep": 64}, "max_keep"),
        ({"keep": 64, 3: 4}, "max_keep"),
        ({"keep": 64, "method": "best"}, "known are: adafv"),
        ({"keep": 64, "method": None}, "name"),
        ({"keep": 64, "method": ["adafv"]}, "name"),
        ({"keep": 64, "method": "downsample"}, "which vLLM does not have here"),
        ({"keep": 64, "parameters": {"variant": "published"}}, "corrected"),
        ({"keep": 64, "parameters": {"variant": "old"}}, "known are: corrected"),
        ({"keep": 64, "parameters": {"objective": ["joint"]}}, "'joint'"),
        ({"keep": 64, "parameters": {"name": "x"}}, "it has objective .*, variant"),
        ({"keep": 64, "method": "uniform", "parameters": {"seed": 1}}, "none"),
        ({"keep": 64, "method": "random", "parameters": {"seed": "1"}}, "such as 0"),
        ({"keep": 64, "method": "random", "parameters": {"seed": True}}, "such as 0"),
        ({"keep": 64, "parameters": ["objective"]}, "by name"),
        ({"keep": 64, "parameters": None}, "by name"),
        ({"keep": 64, "text": "all"}, "question, turn, after"),
        ({"keep": 64, "text": ["turn"]}, "question, turn, after"),
        ({"keep": 64, "crops": "some"}, "no number of crops"),
        ({"keep": 64, "crops": None}, "no number of crops"),
        ({"keep": 64, "crops": "auto"}, "ask again with crops='all'"),
        ({"keep": 64, "tower_cache_mb": -1}, "MiB"),
        ({"keep": 64, "tower_cache_mb": "256"}, "MiB"),
        ({"keep": 64, "tower_cache_mb": True}, "MiB"),
        ({"keep": 64, "tower_cache_mb": None}, "MiB"),
        ({"keep": 64, "tower_cache_mb": math.nan}, "MiB"),
        ({"keep": 64, "tower_cache_mb": math.inf}, "MiB"),
    ],
    ids=str,
)
def test_a_bad_server_is_not_started(options: Any, mentions: str) -> None:
    with pytest.raises(OptionError, match=mentions):
        ServerSettings.of(options)


@pytest.mark.parametrize(
    "options", [64, "64", [64], True, {"max_keep": 64}, {"keep": 64, "method": "text"}, {3: 4}], ids=str
)
def test_a_request_chooses_its_budget_and_nothing_else(options: Any) -> None:
    with pytest.raises(OptionError, match="keep"):
        server().asked(options)


def test_who_asks_for_nothing_gets_the_servers_budget() -> None:
    assert server().asked(None) == server().asked({}) == Budget(64)


@given(JSON, JSON)
def test_whatever_json_comes_is_taken_or_refused_with_a_reason(options: Any, keep: Any) -> None:
    for ask in (
        ServerSettings.of,
        server().asked,
        lambda given: server().crops_asked({"crops": given}),
        lambda given: server().asked({"keep": given}),
        lambda given: server(text=given),
    ):
        for value in (options, keep, {"keep": keep}):
            with suppress(BudgetError, OptionError):
                ask(value)


@given(COUNTS | SHARES, st.integers(1, 10_000))
def test_a_budget_means_the_same_for_server_and_request(keep: float, available: int) -> None:
    """A number of tokens is an upper bound, so that one budget fits images of different sizes in one request."""
    of_server, of_request = server(keep=keep).asked(None), server().asked({"keep": keep})
    assert of_server == of_request
    expected = min(keep, available) if isinstance(keep, int) else Budget(keep).tokens(available)
    assert of_server.tokens(available) == of_request.tokens(available) == expected


@pytest.mark.parametrize("keep", ["10%", "0.1", "64", "all"])
def test_a_budget_may_be_written_as_on_the_command_line(keep: str) -> None:
    assert server(keep=keep).budget == server().asked({"keep": keep}) == Budget.of(keep)


@given(COUNTS | SHARES, COUNTS | SHARES, COUNTS | SHARES, st.integers(1, 10_000))
def test_nobody_gets_more_than_the_most(keep: float, most: float, asked: float, available: int) -> None:
    """What vLLM reserves memory for by `most` is enough for every request that is not refused."""
    try:
        settings = server(keep=keep, max_keep=most)
        budgets = [settings.budget, settings.asked({"keep": asked})]
        tokens = [budget.tokens(available) for budget in budgets]
    except BudgetError:
        return
    assert max(tokens) <= settings.most.tokens(available) <= available


@given(COUNTS, SHARES)
def test_shares_and_numbers_of_tokens_do_not_compare(count: int, share: float) -> None:
    assume(share != 1.0)
    for keep, most in ((count, share), (share, count)):
        with pytest.raises(BudgetError, match="do not compare"):
            server(keep=keep, max_keep=most)
        kind = "a share" if isinstance(most, float) else "a number of tokens"
        with pytest.raises(BudgetError, match=f"max_keep=.* do not compare; ask for {kind}"):
            server(keep=most, max_keep=most).asked({"keep": keep})
    assert server(keep=count, max_keep=1.0).asked({"keep": share}).keep == share


def test_more_than_the_most_is_refused() -> None:
    with pytest.raises(BudgetError, match="max_keep=32"):
        server(max_keep=32)
    with pytest.raises(BudgetError, match="at most max_keep=64"):
        server(max_keep=64).asked({"keep": 65})
    with pytest.raises(BudgetError, match="at most max_keep=50 %"):
        server(keep=0.1, max_keep=0.5).asked({"keep": 1.0})


@pytest.mark.parametrize(
    "other",
    [{"method": "saliency"}, {"parameters": {"objective": "split"}}, {"text": "turn"}, {"text": "after"}],
    ids=str,
)
def test_the_identity_tells_apart_what_decides_which_tokens_stay(other: dict[str, Any]) -> None:
    assert server(**other).identity != server().identity


def test_crops_are_the_requests_or_the_servers() -> None:
    for crops in (1, "1", "thumbnail"):
        assert server(crops=crops).crops_asked(None) == server(crops=crops).crops_asked({}) == Crops.of(crops)
        assert server().crops_asked({"crops": crops, "keep": 3}) == Crops.of(crops)
    assert server(crops=1).crops_asked({"crops": "all"}) == server().crops == Crops.of("all")
    with pytest.raises(OptionError, match="ask with crops='thumbnail'"):
        server().crops_asked({"crops": "auto"})


def test_crops_are_ranked_by_what_the_server_reads() -> None:
    """What is read of the tower, and kept in its cache, is decided at the start."""
    unread = server(method="uniform")
    assert unread.crops_asked({"crops": "thumbnail"}) == Crops.of("thumbnail")
    with pytest.raises(OptionError, match="start the server with crops=1"):
        unread.crops_asked({"crops": 1})
    read = server(method="uniform", crops=2)
    assert read.crops_asked({"crops": 1}) == Crops.of(1)
    assert read.signals == unread.signals | {SALIENCY}
    assert server(crops="thumbnail", method="uniform").signals == unread.signals


def test_tokens_that_crops_leave() -> None:
    """Front and worker count alike: what is there whichever crops are chosen, and at most the budget."""
    layout = ImageLayout(torch.arange(48), 3, 4, 4, (1, 2))
    for crops, most in (("all", 48), ("thumbnail", 16), (1, 32), (9, 48)):
        for keep in (1, 16, 17, 40, 1.0):
            counted = server().tokens_of(layout, Budget.of(keep), True, Crops.of(crops))
            assert counted == min(Budget.of(keep).tokens(48), most)


def test_the_identity_is_blind_to_everything_else() -> None:
    same = server(
        keep=0.5, max_keep=0.7, tower_cache_mb=0, method="adafv", parameters={"objective": "joint"}, text=None
    )
    assert same.identity == server().identity


def test_methods_of_the_same_options_are_told_apart() -> None:
    names = ("adafv", "saliency", "text", "uniform", "random")
    assert len({server(method=name).identity for name in names}) == len(names)
    assert server(method="random", parameters={"seed": 1}).identity != server(method="random").identity


def test_the_size_of_the_cache_is_in_mebibytes() -> None:
    assert [server(tower_cache_mb=size).tower_cache_bytes for size in (0, 0.5, 2)] == [0, 2**19, 2**21]
