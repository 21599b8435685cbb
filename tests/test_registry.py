"""The registry: what is broken takes down itself alone and is named; other distributions bring methods and families."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, run
from forking import in_a_copy
from models import make_inputs
from rows import llava, llava_next

from adafv import AdaFV, Pruner
from adafv.asking.session import Session
from adafv.bundled import sample_pictures
from adafv.core import ImageLayout
from adafv.engines.serving.settings import ServerSettings
from adafv.engines.transformers.families import base, family_of, found_families, known_families
from adafv.environment import as_text, environment
from adafv.errors import MethodError, OptionError, UnsupportedModelError
from adafv.evaluation.answers import Asker, configurations
from adafv.methods import found_methods, known_methods, method_named
from adafv.methods.base import Method
from adafv.methods.options import method_from_options
from adafv.registry import Found, cause, find

FAMILIES = "adafv.engines.transformers.families"
METHOD = """\
from dataclasses import dataclass

from adafv.core import top_tokens
from adafv.methods import Kept, Method


@dataclass(frozen=True)
class Outliers(Method):
    power: float = 1.0
    name = "outliers"
    summary = "distance from the mean token"

    def select(self, tokens, keep):
        distance = (tokens.features - tokens.features.mean(1, keepdim=True)).norm(dim=-1) ** self.power
        return Kept(top_tokens(distance, keep, tokens.candidates))
"""
FAMILY = """\
from adafv.engines.transformers.families.llava import Llava


class Foreign(Llava):
    name = "Foreign"
    model_classes = ("ForeignForConditionalGeneration",)
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(distribution, {module: source}, {group: {name: value}}), as pip leaves a distribution behind."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def forget() -> None:
        for cached in (found_methods, found_families, known_families):
            cached.cache_clear()
        for name in modules:
            sys.modules.pop(name, None)

    def installed(distribution: str, sources: dict[str, str], entries: dict[str, dict[str, str]]) -> None:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
            modules.append(name)
        folder = tmp_path / f"{distribution}-1.5.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (folder / "entry_points.txt").write_text(
            "\n".join(
                f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in lines.items())
                for group, lines in entries.items()
            )
        )
        importlib.invalidate_caches()
        forget()

    yield installed
    forget()


class TestOtherDistributions:
    def test_a_method_is_found_wherever_methods_are_named(self, install: Install) -> None:
        install("outliers", {"outlying": METHOD}, {"adafv.methods": {"outliers": "outlying:Outliers"}})
        assert "outliers" in known_methods()
        assert method_named("outliers", power=2.0).power == 2.0  # type: ignore[attr-defined]
        assert found_methods().homes["outliers"] == "outlying:Outliers (outliers 1.5)"
        assert found_methods().broken == ()
        listed = run("methods")
        assert listed.exit_code == 0
        assert "outliers" in listed.stdout
        assert "distance from the mean token" in listed.stdout
        served = ServerSettings.of({"keep": 8, "method": "outliers", "parameters": {"power": 3.0}})
        assert served.method == method_named("outliers", power=3.0)
        assert "outliers" in environment()["methods"]["known"]

    def test_a_method_answers_on_the_command_line(self, install: Install) -> None:
        install("outliers", {"outlying": METHOD}, {"adafv.methods": {"outliers": "outlying:Outliers"}})
        [sample, *_] = sorted(sample_pictures())
        result = run("ask", sample, "What is in the picture?", "--method", "outliers", "--keep", "10%", "--json")
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)
        assert said["method"] == "outliers"

    def test_a_family_serves_its_model(self, install: Install) -> None:
        install("foreign", {"foreign_models": FAMILY}, {"adafv.families": {"foreign": "foreign_models:Foreign"}})
        model = llava.ROW.build()
        assert family_of(model).name == "LLaVA-1.5"
        model.__class__ = type("ForeignForConditionalGeneration", (type(model),), {})
        assert family_of(model).name == "Foreign"
        inputs = make_inputs(llava.ROW, model, [1])
        with torch.no_grad(), AdaFV(keep=3)(model) as adafv:
            model(**inputs)
        assert adafv.last.tokens_after == [3]
        assert "Foreign" in run("families").stdout

    @pytest.mark.parametrize(
        ("source", "why"),
        [
            ("raise RuntimeError('no kernel')", "RuntimeError: no kernel"),
            ("from transformers import Renamed as Outliers", "cannot import name 'Renamed'"),
            ("raise SystemExit(3)", "SystemExit: 3"),
            ("Outliers = print", "no class derived from adafv.methods.base.Method"),
            ("class Outliers: pass", "no class derived from adafv.methods.base.Method"),
            (METHOD + "\nOutliers.__signature__ = 3", "TypeError: unexpected object 3 in __signature__"),
            (METHOD.replace("def select", "def choose"), "is abstract: it lacks select"),
            (METHOD.replace("@dataclass(frozen=True)", ""), "is no dataclass"),
            (
                METHOD.replace("    power: float = 1.0", "    def __init__(self, power): pass\n    power = 1"),
                "takes power without fields of that name",
            ),
            (METHOD.replace("power", "crops"), "has an option crops, which is one of Pruner's own"),
            (METHOD.replace('name = "outliers"', 'name = "inliers"'), "class is named 'inliers'"),
            (METHOD.replace('    name = "outliers"\n', ""), "has no name"),
            (METHOD.replace("    summary", "    other"), "has no summary"),
            (METHOD.replace("    summary", "    needs = {'saliency'}\n    summary"), "has needs that are no signals"),
            (METHOD.replace("    summary", "    stages = 'tokens'\n    summary"), "has stages that are no set"),
            (METHOD.replace("power: float", 'power: "Nowhere"'), "name 'Nowhere' is not defined"),
            (
                METHOD.replace("= 1.0", "= field(default_factory=lambda: 1 / 0)").replace(
                    "dataclass\n", "dataclass, field\n", 1
                ),
                "cannot be listed, by type and default: ZeroDivisionError",
            ),
        ],
    )
    def test_what_is_wrong_with_a_method_is_said(self, install: Install, source: str, why: str) -> None:
        install("outliers", {"outlying": source}, {"adafv.methods": {"outliers": "outlying:Outliers"}})
        assert method_named("uniform").name == "uniform"
        [broken] = found_methods().broken
        assert broken.home == "outlying:Outliers (outliers 1.5)"
        assert why in broken.why
        with pytest.raises(OptionError, match="'outliers' could not be loaded: outlying:Outliers"):
            method_named("outliers")
        with pytest.raises(OptionError, match=r"no method 'other'.*not loaded: outlying:Outliers \(outliers 1.5\)"):
            method_named("other")
        assert f"not loaded: {broken}" in run("methods").stdout
        facts = environment()
        assert facts["methods"]["broken"] == [str(broken)]
        assert f"methods not loaded  {broken}" in as_text(facts)
        refused(run("ask", "photo.png", "What?", "--method", "outliers"), 1, "photo.png")

    @pytest.mark.parametrize(
        ("source", "why"),
        [
            ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
            (FAMILY.replace('("ForeignForConditionalGeneration",)', '"Foreign"'), "has no model_classes"),
            (FAMILY + "    def __init__(self, size): pass\n", "cannot be made without arguments: TypeError"),
            (FAMILY.replace("(Llava)", ""), "no class derived from adafv.engines.transformers.families.base.Family"),
        ],
    )
    def test_what_is_wrong_with_a_family_is_said(self, install: Install, source: str, why: str) -> None:
        install("foreign", {"foreign_models": source}, {"adafv.families": {"foreign": "foreign_models:Foreign"}})
        assert family_of(llava.ROW.build()).name == "LLaVA-1.5"
        [broken] = found_families().broken
        assert why in broken.why
        with pytest.raises(UnsupportedModelError, match=r"not loaded: foreign_models:Foreign \(foreign 1.5\)"):
            family_of(torch.nn.Linear(2, 2))
        assert f"not loaded: {broken}" in run("families").stdout
        assert f"families not loaded  {broken}" in as_text(environment())

    def test_the_name_of_a_built_in_method_is_refused(self, install: Install) -> None:
        source = METHOD.replace('"outliers"', '"random"')
        install("outliers", {"outlying": source}, {"adafv.methods": {"random": "outlying:Outliers"}})
        assert known_methods()["random"].__module__ == "adafv.methods.random"
        [broken] = found_methods().broken
        assert "outlying:Outliers (outliers 1.5)" in str(broken)
        assert "adafv.methods.random:Random" in str(broken)
        with pytest.warns(UserWarning, match="adafv.methods.random:Random"):
            assert type(method_named("random")).__module__ == "adafv.methods.random"
        with pytest.warns(UserWarning, match="the name 'random' is also that of adafv.methods.random:Random"):
            assert type(Pruner("random", 4).settings.method).__module__ == "adafv.methods.random"

    @pytest.mark.parametrize("name", ["blank", "unpruned", "all", "a,b", "a:b"])
    def test_names_that_mean_something_else_are_refused(self, install: Install, name: str) -> None:
        """A table of answers has a row of blanked pictures; a method of that name was asked about them, and had none."""
        source = METHOD.replace('"outliers"', repr(name))
        install("outliers", {"outlying": source}, {"adafv.methods": {name: "outlying:Outliers"}})
        assert "read as something else" in str(found_methods().broken[0])
        assert name not in known_methods()

    def test_of_two_with_one_name_neither_is_taken(self, install: Install) -> None:
        install("one", {"of_one": METHOD}, {"adafv.methods": {"outliers": "of_one:Outliers"}})
        install("two", {"of_two": METHOD}, {"adafv.methods": {"outliers": "of_two:Outliers"}})
        assert "outliers" not in known_methods()
        with pytest.raises(OptionError) as refusal:
            method_named("outliers")
        assert "of_one:Outliers (one 1.5)" in str(refusal.value)
        assert "of_two:Outliers (two 1.5)" in str(refusal.value)

    def test_two_families_for_one_class_are_refused(self, install: Install) -> None:
        source = FAMILY.replace("ForeignForConditionalGeneration", "LlavaForConditionalGeneration")
        install("foreign", {"foreign_models": source}, {"adafv.families": {"foreign": "foreign_models:Foreign"}})
        with pytest.raises(
            UnsupportedModelError, match=r"claimed by Foreign .*foreign 1.5.* and LLaVA-1.5 .*llava:Llava"
        ):
            family_of(llava.ROW.build())
        assert family_of(llava_next.ROW.build()).name == "LLaVA-NeXT"

    @pytest.mark.parametrize(
        ("kind", "default", "given"),
        [
            ("tuple[int, int]", "(1, 2)", (3, 4)),
            ("list[str]", "field(default_factory=list)", ["a"]),
            ("Callable[[int], float]", "float", abs),
            ("tuple[float, float] | None", "None", (0.5, 0.5)),
        ],
    )
    def test_options_that_python_code_alone_can_give(
        self, install: Install, kind: str, default: str, given: Any
    ) -> None:
        """They are listed, kept as they are, refused on the command line; and the others beside them are read."""
        source = METHOD.replace("power: float = 1.0", f"power: float = 1.0\n    sizes: {kind} = {default}")
        source = source.replace("import dataclass\n", "import dataclass, field\nfrom collections.abc import Callable\n")
        install("outliers", {"outlying": source}, {"adafv.methods": {"outliers": "outlying:Outliers"}})
        assert run("methods").exit_code == 0
        assert Pruner("outliers", 4, sizes=given).settings.method == method_named("outliers", sizes=given)
        with pytest.raises(OptionError, match="sizes is an object of Python"):
            method_from_options("outliers", ["sizes=3"])
        assert method_from_options("outliers", ["power=3"]) == method_named("outliers", power=3.0)
        assert ServerSettings.of({"keep": 8, "method": "outliers"}).identity

    def test_a_plan_that_is_another_each_time(self, install: Install) -> None:
        """Where vLLM's worker kept more than the prompt has places for, it would read the first of them."""
        source = METHOD.replace(
            "import dataclass\n", "import dataclass\nfrom itertools import cycle\nfrom adafv import Plan\n"
        )
        source += (
            "\n    def plan(self, layout, keep):\n        return Plan(next(NUMBERS))\n\n\nNUMBERS = cycle([3, 4])\n"
        )
        install("outliers", {"outlying": source}, {"adafv.methods": {"outliers": "outlying:Outliers"}})
        settings = ServerSettings.of({"keep": 8, "method": "outliers"})
        with pytest.raises(MethodError, match="the method outliers plans otherwise each time"):
            settings.tokens_of(ImageLayout(torch.arange(16), 1, 4, 4), settings.budget, words=True)

    def test_what_is_known_of_a_release_is_not_taken_for_the_next(self, install: Install, tmp_path: Path) -> None:
        """Stored answers, and pruned images in a server's caches: what the method chooses may be otherwise."""
        entries = {
            "adafv.methods": {"outliers": "outlying:Outliers"},
            "adafv.families": {"f": "foreign_models:Foreign"},
        }
        install("outliers", {"outlying": METHOD, "foreign_models": FAMILY}, entries)

        def known() -> tuple[Any, ...]:
            unpruned, way, saliency = configurations(["outliers:power=2", "saliency"], [8], blank=False)
            asker = Asker(Session.load("bundled", "float32", "cpu"))
            asker.session.model.__class__ = type("ForeignForConditionalGeneration", (type(asker.session.model),), {})
            identity = ServerSettings.of({"keep": 8, "method": "outliers"}).identity
            assert (unpruned.stored, saliency.stored) == (("unpruned", "1.0"), ("saliency", "8"))
            assert way.way == ("outliers:power=2.0", "8")
            return *way.stored, identity, asker.fingerprint()["versions"]["family Foreign"]

        before = known()
        assert before[0] == "outliers:power=2.0 of outlying:Outliers (outliers 1.5)"
        (tmp_path / "outliers-1.5.dist-info").rename(tmp_path / "outliers-1.6.dist-info")
        metadata = tmp_path / "outliers-1.6.dist-info/METADATA"
        metadata.write_text(metadata.read_text().replace("1.5", "1.6"))
        importlib.invalidate_caches()
        for cached in (found_methods, found_families, known_families):
            cached.cache_clear()
        after = known()
        assert after[0] == "outliers:power=2.0 of outlying:Outliers (outliers 1.6)"
        assert [one == two for one, two in zip(before, after, strict=True)] == [False, True, False, False]

    def test_an_option_without_a_default_is_asked_for(self, install: Install) -> None:
        source = METHOD.replace("power: float = 1.0", "power: float")
        install("outliers", {"outlying": source}, {"adafv.methods": {"outliers": "outlying:Outliers"}})
        with pytest.raises(OptionError, match="no default for power"):
            method_named("outliers")
        assert method_named("outliers", power=1.0).name == "outliers"


class TestOneThatIsBroken:
    def test_a_renamed_function_of_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.models.llava_next import modeling_llava_next

        next_model = llava_next.ROW.build()
        inputs = make_inputs(llava_next.ROW, next_model, [1])  # asks the stock model how long an image is
        monkeypatch.delattr(modeling_llava_next, "image_size_to_num_patches")
        model = llava.ROW.build()
        with torch.no_grad(), AdaFV(keep=3)(model) as adafv:
            model(**make_inputs(llava.ROW, model, [1]))
        assert adafv.last.tokens_after == [3]
        with torch.no_grad(), AdaFV(keep=3)(next_model), pytest.raises(UnsupportedModelError) as refusal:
            next_model(**inputs)
        assert "image_size_to_num_patches" in str(refusal.value)
        assert "transformers<=" in str(refusal.value)

    def test_a_family_that_cannot_be_imported_takes_down_those_derived_from_it_alone(self) -> None:
        """In a process of its own: there, one family's module cannot be imported."""

        def without_it() -> dict[str, Any]:
            sys.modules[f"{FAMILIES}.llava_next"] = None  # type: ignore[assignment]
            del sys.modules["command_line"]
            from command_line import run

            from adafv.engines.transformers.families import family_of, found_families
            from adafv.environment import as_text, environment

            found = found_families()
            with pytest.raises(TypeError) as refusal:
                family_of(llava_next.ROW.build())
            return {
                "names": list(found.classes),
                "broken": [str(broken) for broken in found.broken],
                "refusal": str(refusal.value),
                "llava": family_of(llava.ROW.build()).name,
                "families": run("families").stdout,
                "env": as_text(environment()),
            }

        said = in_a_copy(without_it)
        there = [base.__name__, *(family.__module__ for family in found_families().classes.values())]
        derived = {
            family.name
            for family in found_families().classes.values()
            if any(cls.__module__ == f"{FAMILIES}.llava_next" for cls in family.__mro__)
        }
        assert "LLaVA-NeXT" in derived
        assert len(there) > 30
        assert set(found_families().classes) - set(said["names"]) >= derived
        lost = set(found_families().classes) - set(said["names"])
        assert {found_families().classes[name].__module__ for name in lost} == {
            broken.split(":")[0] for broken in said["broken"]
        }
        assert len(lost) <= 4  # LLaVA-NeXT, and what reads its files: its videos and LLaVA-OneVision
        assert said["llava"] == "LLaVA-1.5"
        for text in (said["refusal"], said["families"], said["env"]):
            assert f"{FAMILIES}.llava_next: ModuleNotFoundError" in text

    def test_a_broken_module_of_methods(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "some_methods"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "outliers.py").write_text(METHOD)
        (package / "broken.py").write_text("1 / 0")
        (package / "bases.py").write_text(METHOD.replace('    name = "outliers"\n', "").replace("Outliers", "Nameless"))
        monkeypatch.syspath_prepend(str(tmp_path))
        found: Found[Any] = find("some_methods", "nobody.registers.this", Method, lambda cls: None)  # type: ignore[type-abstract]
        assert list(found.classes) == ["outliers"]
        assert [str(broken) for broken in found.broken] == ["some_methods.broken: ZeroDivisionError: division by zero"]


def test_causes_hold_no_paths() -> None:
    """What is put into bug reports is nobody's own."""
    assert cause(ImportError("cannot import name 'x' from 'y' (/home/anna/y.py)")) == (
        "ImportError: cannot import name 'x' from 'y'"
    )
    assert cause(OSError("no file /home/anna/secret")) == "OSError"
    assert cause(OSError("C:\\anna\\secret.dll")) == "OSError"
    assert cause(ValueError("two\nlines \x1b[2J")) == "ValueError: two lines \\x1b[2J"


def test_everything_of_ours_loads() -> None:
    assert found_methods().broken == ()
    assert found_families().broken == ()
