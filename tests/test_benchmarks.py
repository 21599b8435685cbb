"""Benchmarks run, on a few cases, and can fail."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from adafv.bundled import bundled_model
from adafv.core import joint_search, split_search
from adafv.engines.transformers.towers import patch_score
from benchmarks import chat, saliency, search


def test_the_search_keeps_what_is_promised(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [search.heavy_tailed(1, tokens) for tokens in (196, 180)]
    monkeypatch.setattr(search, "of_photographs", lambda *_: scores)
    assert search.main(["--cases", "6", "--testbed", "models/small-vlm", "--photos", str(Path())]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| random", "| small-vlm"))]
    assert len(shown) == 2 * len(search.BUDGETS)


def test_another_search_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "joint_search", split_search)
    monkeypatch.setattr(search, "split_search", joint_search)
    assert search.main(["--cases", "30"]) == 1  # it is below the other somewhere


@pytest.mark.release
def test_second_questions(capsys: pytest.CaptureFixture[str]) -> None:
    chat.main(["--pairs", "2", "--methods", "uniform", "--keep", "144", "--no-photos"])
    *_, row = capsys.readouterr().out.splitlines()
    shares = [float(cell) for cell in row.split("|")[2:-1]]
    assert shares[0] == shares[1]  # nothing is pruned, so what was chosen does not matter
    assert shares[2] == shares[3]


def test_areas_on_a_few_scenes() -> None:
    found = saliency.scene_areas(3)
    assert found.values
    for values in found.values.values():
        assert all(0 <= area <= 1 for areas in values.values() for area in areas)


def test_the_chosen_score_is_the_one_that_the_library_computes() -> None:
    model = AutoModelForImageTextToText.from_pretrained(bundled_model()).eval()
    with torch.no_grad():
        layers = saliency.probe(model.model.vision_tower, torch.randn(1, 3, 144, 144))
    tapped = saliency.tapped_layer(model)
    layer = layers[tapped]
    query, key, value = (part[:, :, 1:] for part in (layer.query, layer.key, layer.value))
    expected = patch_score(query, key, value, layer.features, layer.scaling, None)
    found = saliency.scores_of(layers, tapped)
    assert any(torch.allclose(score, expected, rtol=1e-4, atol=1e-7) for score in found.values())
    assert all(torch.isfinite(score).all() for score in found.values())
