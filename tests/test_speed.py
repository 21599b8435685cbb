"""`adafv bench speed`: what it counts is right, what it times adds up, and its other ways are what they say. Tiny shapes: the
seconds themselves are not tested, they need a quiet machine."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from command_line import refused, run
from oracle import masked_inputs
from sharing import little_to_look_through

from adafv import Pruner
from adafv.core.stages import stage
from adafv.errors import OptionError, UnsupportedModelError
from adafv.evaluation.speed import shapes, stages
from adafv.evaluation.speed.choosing import measure_methods
from adafv.evaluation.speed.counting import Counting
from adafv.evaluation.speed.report import as_tables
from adafv.evaluation.speed.run import Options, measure
from adafv.evaluation.speed.shapes import SHAPES, Subject, subject
from adafv.evaluation.speed.stages import REST, StageClock, Stages, listening, staged
from adafv.evaluation.speed.ways import ideal, listened_to, published
from adafv.methods import known_methods

TINY = ("llava-tiny", "llava-next-tiny", "qwen2.5-vl-tiny")
CPU = torch.device("cpu")
QUICK = Options(budgets=(8,), rounds=1, warm=0, decode=1)


@pytest.fixture(scope="module", autouse=True)
def collects_often() -> Iterator[None]:
    with little_to_look_through():
        yield


@pytest.fixture(scope="module")
def llava() -> Subject:
    return subject("llava-tiny", dtype="float32")


@pytest.fixture(scope="module")
def measured(llava: Subject) -> dict[str, Any]:
    return measure(llava, replace(QUICK, methods=("random",), rounds=2))


class TestStages:
    @pytest.fixture
    def ticking(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = iter(range(100))
        monkeypatch.setattr(stages.time, "perf_counter", lambda: float(next(now)))

    def test_the_innermost_counts_and_all_add_up(self, ticking: None) -> None:
        clock = StageClock(CPU)
        with listening(clock):
            with stage("tower"):
                with stage("projector"):
                    pass
                with stage("projector"):
                    pass
            with stage("model"):
                pass
        found = clock.seconds()
        assert found == {"tower": 3, "projector": 2, "prefill": 1, REST: 3}
        assert sum(found.values()) == clock.marks - 1

    def test_nobody_listens_outside(self) -> None:
        clock = StageClock(CPU)
        with listening(clock):
            pass
        with stage("tower"):
            pass
        assert set(clock.seconds()) == {REST}

    def test_a_stage_ends_with_an_error(self) -> None:
        heard, layer = Stages(), torch.nn.Linear(2, 3)
        with listening(heard), staged({"layer": layer}):
            with pytest.raises(RuntimeError):
                layer(torch.zeros(5))
            assert heard.current == REST
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


class TestCounting:
    def test_a_product(self) -> None:
        heard, layer = Stages(), torch.nn.Linear(8, 4, bias=False)
        count = Counting(heard, CPU, layer)
        with torch.no_grad(), listening(heard), count, stage("tower"):
            out = layer(torch.ones(3, 8)).view(2, 6)
        assert out.shape == (2, 6)
        counts = count.counts["tower"]
        assert (counts.operations, counts.flops) == (2, 2 * 3 * 8 * 4)  # ones, mm; views are none
        assert counts.weights == 4 * 8 * 4
        assert counts.bytes == 4 * 3 * 8 + 4 * (3 * 8 + 8 * 4 + 3 * 4)
        assert counts.waits == 0

    def test_attention_lookups_and_waits(self) -> None:
        query = torch.randn(1, 2, 8, 16)
        table = torch.nn.Embedding(1000, 4)
        count = Counting(Stages(), CPU, table)
        with torch.no_grad(), count:
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
            table(torch.zeros(3, dtype=torch.long))
            query[query > 0].sum().item()
        found = count.counts[REST]
        assert found.flops == 2 * 2 * 8 * 8 * 32
        assert found.weights == 4 * 3 * 4  # three rows, not the table
        assert found.waits == 2

    def test_memory_that_is_alive_at_once(self) -> None:
        count = Counting(Stages(), CPU)
        with count:
            one = torch.zeros(1000)
            one = one + 1
            one.add_(1)
        assert (count.living.peak, count.living.bytes) == (8000, 4000)

    def test_what_is_not_on_the_device_is_told_apart(self) -> None:
        count = Counting(Stages(), torch.device("meta"))
        with count:
            torch.zeros(10) + 1
            there = torch.zeros(10, device="meta") + 1
        assert len(there) == 10
        assert (count.counts[REST].operations, count.counts[REST].on_host, count.living.peak) == (2, 2, 80)


class TestShapes:
    @pytest.mark.parametrize("name", TINY)
    def test_the_stock_model_answers(self, name: str) -> None:
        found = subject(name, dtype="float32")
        with torch.no_grad():
            logits = found.model(**found.inputs(2), logits_to_keep=1).logits
        assert logits.shape[:2] == (2, 1)
        assert logits.isfinite().all()
        assert found.whole

    @pytest.mark.parametrize(
        ("name", "parameters"),
        [("llava-1.5-7b", 7.063e9), ("llava-next-7b", 7.063e9), ("qwen2.5-vl-7b", 8.292e9), ("qwen2.5-vl-3b", 4.07e9)],
    )
    def test_true_shapes_have_the_true_size(self, name: str, parameters: float) -> None:
        """As their checkpoints have it; of Qwen2.5-VL-3B 3.75e9, and the head that it ties to its embeddings."""
        with torch.device("meta"):
            shape = SHAPES[name]
            model = shapes._class_of(shape)(shapes.config_of(shape, 2))
        layer = sum(each.numel() for each in model.model.language_model.layers[0].parameters())
        whole = sum(each.numel() for each in model.parameters()) + (shape.text["num_hidden_layers"] - 2) * layer
        assert whole == pytest.approx(parameters, rel=0.01)

    def test_what_memory_allows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = 15.9e9 * shapes.ROOM / 1.125  # bfloat16, with room
        monkeypatch.setattr(shapes, "free_memory", lambda device: 40e9)
        assert shapes._that_fit(SHAPES["llava-1.5-7b"], CPU, torch.bfloat16) == (32, [])
        monkeypatch.setattr(shapes, "free_memory", lambda device: whole / 2)
        layers, [note] = shapes._that_fit(SHAPES["llava-1.5-7b"], CPU, torch.bfloat16)
        assert 10 < layers < 20
        assert "GB" in note
        monkeypatch.setattr(shapes, "free_memory", lambda device: 1e9)
        with pytest.raises(OptionError, match="too little"):
            shapes._that_fit(SHAPES["llava-1.5-7b"], CPU, torch.bfloat16)

    def test_every_weight_is_filled(self) -> None:
        model = torch.nn.Linear(1500, 1500)
        with torch.no_grad():
            model.weight.fill_(float("nan"))
        shapes.fill_weights(model)
        assert model.weight.isfinite().all()
        assert float(model.weight.detach().std()) == pytest.approx(0.02, rel=0.01)


class TestWays:
    @torch.no_grad()
    def test_the_ideal_is_the_oracle_of_the_first_tokens(self, llava: Subject) -> None:
        inputs = llava.inputs(2)
        visual = inputs["input_ids"] == llava.model.config.image_token_id
        mask = ~visual | (visual.cumsum(-1) <= 5)
        expected = llava.model(**masked_inputs(inputs, mask)).logits[:, -1:]
        torch.testing.assert_close(ideal(llava, inputs, 5).run().logits, expected, atol=2e-5, rtol=2e-5)

    @torch.no_grad()
    @pytest.mark.parametrize("name", TINY[:2])
    def test_the_published_way_is_the_published_variant(self, name: str) -> None:
        found = subject(name, dtype="float32")
        inputs = found.inputs(2)
        with Pruner("adafv", keep=20 if "next" in name else 6, variant="published")(found.model) as handle:
            expected = found.model(**inputs, logits_to_keep=1).logits
        assert handle.last.tokens_after[0] in (6, 20)
        mine = published(found, inputs, 20 if "next" in name else 6).run().logits
        torch.testing.assert_close(mine, expected, atol=2e-5, rtol=2e-5)

    def test_there_is_no_published_way_for_others(self) -> None:
        found = subject("qwen2.5-vl-tiny", dtype="float32")
        with pytest.raises(UnsupportedModelError, match="Qwen"):
            published(found, found.inputs(), 8)

    def test_a_model_is_left_as_it_was(self, llava: Subject, measured: dict[str, Any]) -> None:
        assert measured["ways"]
        ours = [
            hook
            for module in llava.model.modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if hook.__module__ == stages.__name__
        ]
        assert ours == []


class TestMeasuring:
    def test_stages_add_up_to_the_call(self, measured: dict[str, Any]) -> None:
        names = [way["name"] for way in measured["ways"]]
        assert names == ["unpruned", "adafv", "random", "ideal", "adafv, encoded", "published way"]
        for way in measured["ways"]:
            assert way["first_token"]["count"] == measured["rounds"] == 2
            low, high = (sum(each["seconds"][end] for each in way["stages"].values()) for end in ("low", "high"))
            assert low <= way["first_token"]["high"]
            assert high >= way["first_token"]["low"]
            assert way["stages"]["prefill"]["operations"] > 0
            assert (way["stages"]["tower"]["operations"] > 0) == ("encoded" not in way["name"])
        assert "to_unpruned" not in measured["ways"][0]

    def test_what_pruning_must_not_cost(self, measured: dict[str, Any]) -> None:
        """Loose enough for another release of transformers, tight enough for a slip of 2x."""
        stock, pruned, _, best, again, old = measured["ways"]
        around = sum(
            stage["operations"]
            for name, stage in pruned["stages"].items()
            if name not in ("tower", "projector", "prefill")
        )
        assert 60 < around <= 200
        assert pruned["stages"]["scores"]["operations"] + pruned["stages"]["selection"]["operations"] <= 100
        assert pruned["stages"]["tower"]["operations"] <= stock["stages"]["tower"]["operations"]
        assert pruned["stages"]["prefill"]["operations"] == stock["stages"]["prefill"]["operations"]
        assert pruned["total"]["flops"] <= best["total"]["flops"] * 1.02
        assert again["total"]["flops"] < pruned["total"]["flops"]
        assert pruned["total"]["waits"] - stock["total"]["waits"] <= 4
        assert old["peak_bytes"] > pruned["peak_bytes"]
        removed = measured["visual_tokens"] - 8
        assert pruned["visual_tokens_kept"] == 8
        before = measured["prompt_tokens"]
        assert pruned["kv_bytes"] / stock["kv_bytes"] == pytest.approx((before - removed) / before)

    def test_a_slice_counts_like_the_whole(self, llava: Subject) -> None:
        """Everything that does not depend on the clock, to the last operation; decoding too."""
        whole, part = (measure(found, QUICK) for found in (llava, subject("llava-tiny", dtype="float32", layers=2)))
        assert (whole["whole"], part["whole"]) == (True, False)
        for mine, theirs in zip(part["ways"], whole["ways"], strict=True):
            assert mine["name"] == theirs["name"]
            assert mine["total"] == pytest.approx(theirs["total"], rel=1e-6)
            assert mine["kv_bytes"] == theirs["kv_bytes"]
            for name in ("operations", "flops"):
                assert mine.get("decode", {}).get(name) == pytest.approx(theirs.get("decode", {}).get(name))
        assert "SCALED from 2 of 4" in as_tables(
            {"machine": {"processor": "", "threads": 1, **VERSIONS}, "models": [part]}
        )

    def test_layers_that_are_missing_are_added(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = subject("llava-tiny", dtype="float32", layers=2)
        now = iter(range(10_000))
        monkeypatch.setattr(stages.time, "perf_counter", lambda: float(next(now)))
        clock = StageClock(CPU)
        with torch.no_grad(), listened_to(found), listening(clock):
            found.model(**found.inputs(), logits_to_keep=1)
        assert clock.seconds()["layers"] == 2  # a tick each

    def test_what_does_not_fit_is_said(self, llava: Subject) -> None:
        found = measure(llava, replace(QUICK, methods=("evs",)))
        assert "evs" not in [way["name"] for way in found["ways"]]
        assert any("evs at 8" in note for note in found["notes"])


VERSIONS = {"torch": "", "transformers": ""}


class TestMethods:
    def test_every_method_is_there(self) -> None:
        found = measure_methods(sizes=((24, 6),), rounds=1, dtype=torch.float32)
        assert {row["method"].split()[0] for row in found["rows"]} == set(known_methods())
        assert found["notes"] == []
        by_name = {row["method"]: row for row in found["rows"]}
        assert by_name["adafv joint"]["operations"] * 4 < by_name["adafv frank-wolfe"]["operations"]
        assert by_name["downsample"]["operations"] == 0

    def test_a_batch_takes_no_more_operations(self) -> None:
        one, eight = (
            measure_methods(["saliency"], sizes=((576, 58),), batch=batch, rounds=1)["rows"][0] for batch in (1, 8)
        )
        assert eight["operations"] <= one["operations"] + 10
        assert eight["bytes"] > 4 * one["bytes"]

    def test_time_runs_out(self) -> None:
        found = measure_methods(["saliency", "text"], sizes=((24, 6),), rounds=1, limit=-1)
        assert found["rows"] == []
        assert len(found["notes"]) == 2


class TestCommand:
    def test_table_and_file(self, tmp_path: Path) -> None:
        file = tmp_path / "speed.json"
        done = run(
            *("bench", "speed", "llava-tiny", "--keep", "8,16", "--rounds", "1", "--decode", "1", "--dtype", "float32"),
            *("--methods", "saliency", "--json", file),
        )
        assert done.exit_code == 0, done.output
        assert "| adafv 8 " in done.stdout
        assert "keep 16 prunes nothing: the prompt has 16 visual tokens" in done.stdout
        assert "keep 8 prunes nothing" not in done.stdout
        assert "random weights" in done.stdout
        found = json.loads(file.read_text())
        assert found["schema"] == "adafv.bench.speed/1"
        assert [model["name"] for model in found["models"]] == ["llava-tiny"]
        assert [row["keep"] for row in found["methods"][0]["rows"]] == [58, 144]

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (["nothing"], ["nothing", "llava-1.5-7b"]),
            (["./nothing"], ["there is no such folder"]),
            (["--keep", "none"], ["keep"]),
            (["--method", "nobody"], ["nobody"]),
            (["--methods", "nobody"], ["nobody"]),
            (["--device", "tpu"], ["cpu or cuda"]),
            (["--dtype", "int8"], ["float32"]),
            (["--rounds", "0"], ["1 or more"]),
            (["--method", "scope,facet:blocks=0"], ["facet:blocks=0", "by default; give facet"]),
            (["--methods", "facet:blocks=0"], ["facet:blocks=0", "by default; give facet"]),
            (["llava-tiny", "--layers", "9"], ["layers=9"]),
            (["llava-tiny", "--picture", "nothing.png"], ["there is no file nothing.png"]),
            (["llava-tiny", "--json", "."], ["--json . is a folder"]),
        ],
    )
    def test_what_is_refused(self, options: list[str], parts: list[str]) -> None:
        done = run("bench", "speed", *options)
        refused(done, done.exit_code, *parts)
        assert done.exit_code in (1, 2)

    def test_help_names_every_shape(self) -> None:
        said = "".join(run("bench", "speed", "--help", env={"COLUMNS": "400"}).stdout.split())
        assert ",".join(SHAPES) in said


class TestScriptForGPUs:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
    def test_without_cuda_it_says_so(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr("sys.argv", ["gpu.py"])
        assert gpu.main() == gpu.NO_CUDA
        assert "no CUDA" in capsys.readouterr().out

    def test_a_part_that_fails_leaves_the_others(self, tmp_path: Path) -> None:
        script = gpu.Script(CPU, tmp_path, 100, rehearse=True)
        done = []

        def fails() -> None:
            raise ValueError("of its own")

        script.run(
            [
                gpu.Part("one", fails, 0),
                gpu.Part("two", lambda: done.append(2), 0),
                gpu.Part("three", lambda: done.append(3), 1000),
            ]
        )
        found = json.loads((tmp_path / "gpu.json").read_text())
        assert done == [2]
        assert found["left_out"] == ["three"]
        assert [each["part"] for each in found["failed"]] == ["one"]
        assert "of its own" in found["failed"][0]["traceback"]

    def test_the_oracle_passes_and_can_fail(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "DTYPES", {"float32": torch.float32})
        monkeypatch.setattr(gpu, "attentions", lambda: ["sdpa"])
        script = gpu.Script(CPU, tmp_path, 100, rehearse=True)
        gpu.oracle_of_family(script, "llava")
        monkeypatch.setattr("oracle.masked_inputs", lambda inputs, *_, **__: inputs)  # nothing is masked
        gpu.oracle_of_family(script, "llava")
        assert [row["passed"] for row in script.result["oracle"]] == [True, False]
        assert len(script.result["failed"]) == 1
