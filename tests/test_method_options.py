"""Options of methods: the fields of their dataclasses, the same for Python, JSON and text, and wrong ones refused."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adafv import AdaFV, Pruner
from adafv.engines.serving.settings import ServerSettings
from adafv.errors import OptionError
from adafv.methods import known_methods
from adafv.methods import options as module
from adafv.methods.adafv import GeometricMean
from adafv.methods.options import (
    in_one_word,
    listed,
    method_from_options,
    method_from_text,
    method_of,
    options_of,
    parameters_from_options,
)
from adafv.methods.random import Random
from adafv.methods.saliency import Saliency


@dataclass(frozen=True)
class Many(Saliency):
    """One option of every kind.

    Args:
        layer: which one;
            the last is -1.
        share, whole: two at once.

    Not an option: nothing.
    """

    layer: int
    share: float = 0.5
    whole: bool = False
    word: str = field(default="a b", metadata={"help": "said by the field"})
    perhaps: int | None = None
    sizes: tuple[int, ...] = (1, 2)
    derived: int = field(init=False, default=3)

    name: ClassVar[str] = "many"


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method as a third party would bring it."""
    monkeypatch.setattr(module, "known_methods", lambda: known_methods() | {"many": Many})


def test_what_is_listed() -> None:
    assert listed(Many) == [
        ("layer", "which one; the last is -1."),
        ("share=0.5", "two at once."),
        ("whole=false", "two at once."),
        ("word=a b", "said by the field"),
        ("perhaps=none", "a whole number, or none"),
        ("sizes=(1, 2)", "an object of Python, such as (1, 2)"),
    ]


@pytest.mark.parametrize("method", known_methods().values(), ids=lambda method: method.name)
def test_every_method_says_what_its_options_mean(method: Any) -> None:
    assert [option.name for option in options_of(method)] == [each.name for each in fields(method) if each.init]
    for option in options_of(method):
        assert option.meaning, option.name
        assert "\n" not in option.meaning
        assert option.kind is not None  # so that a command line can give it
        assert option.read(str(option)) == option.default


@pytest.mark.usefixtures("many")
class TestReading:
    @pytest.mark.parametrize(
        ("written", "values"),
        [
            (["layer=-2"], {"layer": -2}),
            ([" layer = 7 ", "share=1"], {"layer": 7, "share": 1.0}),
            (["layer=0", "share=1e-3", "whole=TRUE"], {"layer": 0, "share": 0.001, "whole": True}),
            (["layer=0", "word=a=b c", "perhaps=none"], {"layer": 0, "word": "a=b c", "perhaps": None}),
            (["layer=0", "word=", "perhaps=3"], {"layer": 0, "word": "", "perhaps": 3}),
        ],
    )
    def test_each_kind(self, written: list[str], values: dict[str, Any]) -> None:
        assert parameters_from_options("many", written) == values
        made = method_from_options("many", written)
        for name, value in values.items():
            assert getattr(made, name) == value
            assert type(getattr(made, name)) is type(value)

    @pytest.mark.parametrize(
        ("written", "said"),
        [
            ([], "needs the option layer; give a whole number"),
            (["layer"], "is not of the form name=value; such as share=0.5"),
            (["=3"], "is not of the form name=value"),
            (["layer=1", "layer=1"], "given twice"),
            (["layer=1.5"], "layer=1.5; give a whole number"),
            (["layer="], "give a whole number"),
            (["layer=none"], "give a whole number"),
            (["layer=1", "share=much"], "share=much; give a number, such as 0.5"),
            (["layer=1", "share=nan"], "give a number"),
            (["layer=1", "share=inf"], "give a number"),
            (["layer=1", "whole=1"], "whole=1; give true or false, such as false"),
            (["layer=1", "perhaps=some"], "give a whole number, or none"),
            (["layer=1", "sizes=1"], "cannot be written here"),
            (["layer=1", "derived=4"], "no option 'derived'"),
            (
                ["layer=1", "name=x"],
                r"no option 'name'; it has layer \(a whole number\), share \(a number, such as 0.5\)",
            ),
            (["layer=" + "9" * 5000], "give a whole number"),
        ],
    )
    def test_refused(self, written: list[str], said: str) -> None:
        with pytest.raises(OptionError, match=said) as error:
            method_from_options("many", written)
        assert len(str(error.value)) < 400

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("layer", value) for value in ("1", 1.0, True, None, [1], math.nan)),
            *(("share", value) for value in ("0.5", False, None, math.inf, 10**400, b"1")),
            *(("whole", value) for value in (1, 0, "true", None)),
            *(("word", value) for value in (1, None, b"a", ["a"])),
            ("perhaps", "none"),
        ],
        ids=repr,
    )
    def test_values_of_another_type(self, name: str, value: Any) -> None:
        with pytest.raises(OptionError, match=f"^{name}=.*; give "):
            method_of("many", {"layer": 1, name: value})

    def test_numbers_of_numpy_and_json(self) -> None:
        made: Any = method_of("many", {"layer": numpy.int64(3), "share": 1, "perhaps": None})
        assert (made.layer, type(made.layer), made.share, type(made.share)) == (3, int, 1.0, float)


@given(st.integers())
def test_in_one_word_and_back(seed: int) -> None:
    word = in_one_word("random", {"seed": seed})
    assert method_from_text(word) == (Random(seed), word)
    assert method_from_text(f" random : seed = {seed}") == (Random(seed), word)
    assert method_from_text("random") == (Random(), "random")


@pytest.mark.parametrize("name", ["adfv", "", None, 3, ["adafv"], "x" * 999], ids=lambda name: repr(name)[:9])
def test_no_such_method(name: Any) -> None:
    with pytest.raises(OptionError, match=r"there is no method .* known are: adafv, ") as error:
        method_of(name, {})
    assert ("did you mean adafv?" in str(error.value)) is (name == "adfv")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"seed": "1"}, "seed='1'; give a whole number, such as 0"),
        ({"seed": True}, "seed=True; give a whole number"),
        ({"sede": 1}, r"no option 'sede'; it has seed \(a whole number, such as 0\)"),
    ],
    ids=str,
)
def test_library_and_server_refuse_in_the_same_words(parameters: dict[str, Any], said: str) -> None:
    for attempt in (
        lambda: Pruner("random", keep=4, **parameters),
        lambda: ServerSettings.of({"keep": 4, "method": "random", "parameters": parameters}),
    ):
        with pytest.raises(OptionError, match=said):
            attempt()


def test_options_of_adafv_are_checked_too() -> None:
    with pytest.raises(OptionError, match="objective=3; give text, such as joint"):
        AdaFV(keep=4, objective=3)  # type: ignore[arg-type]
    assert AdaFV(keep=4, objective="split").settings.method == GeometricMean("split")


def test_options_beside_a_method_that_has_its_own() -> None:
    """They had no effect, and nobody said so."""
    with pytest.raises(OptionError, match="seed: a Method has its options already"):
        Pruner(Random(), keep=4, seed=3)


@pytest.mark.parametrize("value", [Random, None, 3])
def test_what_is_no_method(value: Any) -> None:
    with pytest.raises(OptionError, match="or a Method: not a class, but what it makes"):
        Pruner(value, keep=4)
