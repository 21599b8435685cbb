"""Qwen-Omni's thinkers: sound beside images, and what of it is refused."""

import importlib
from typing import Any

import pytest
import torch
from models import BEGIN, FAMILIES, PATCH, FamilyRow, make_inputs, noise, words
from oracle import kept_logits
from rows.qwen2_5_omni import AUDIO, AUDIO_END, AUDIO_START, MELS

from adafv import AdaFV
from adafv.errors import UnsupportedCallError, UnsupportedModelError

ROWS = [row for row in FAMILIES if row.name in ("qwen2.5-omni", "qwen3-omni")]
MODULES = ["rows.qwen2_5_omni", "rows.qwen3_omni"]
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
FRAMES = 20


@pytest.fixture(params=ROWS, ids=[row.name for row in ROWS])
def row(request: pytest.FixtureRequest) -> FamilyRow:
    return request.param


def heard(model: Any, row: FamilyRow, sounds: int) -> tuple[dict[str, Any], list[int]]:
    """Entries of so many sounds, and the tokens of each."""
    module = importlib.import_module(type(model).__module__)
    if row.name == "qwen3-omni":
        count = int(module._get_feat_extract_output_lengths(torch.tensor(FRAMES), model.config.audio_config.n_window))
    else:
        count = int(model.model.audio_tower._get_feat_extract_output_lengths(torch.tensor(FRAMES))[1])
    entries = {
        "input_features": noise(77, sounds, MELS, FRAMES),
        "feature_attention_mask": torch.ones(sounds, FRAMES, dtype=torch.long),
    }
    return entries, [AUDIO_START, *[AUDIO] * count, AUDIO_END]


def sound_and_images(model: Any, row: FamilyRow, order: str) -> dict[str, Any]:
    """A prompt of "i"mages and "s"ounds in this order."""
    sizes = row.sizes[: order.count("i")]
    entries, shown = row.images(model, [sizes], 0)
    sounds, tokens = heard(model, row, order.count("s"))
    images, prompt = iter(shown), [BEGIN, *words(3, 0)]
    for number, kind in enumerate(order):
        prompt += [*(next(images) if kind == "i" else tokens), *words(2, number)]
    ids = torch.tensor([[*prompt, *words(4, 9)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **entries, **sounds}


@pytest.mark.parametrize("order", ["is", "si", "isi", "ssi"])
def test_sound_beside_images(row: FamilyRow, order: str) -> None:
    model = row.build()
    inputs = sound_and_images(model, row, order)
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
        audio_seqlens=inputs["feature_attention_mask"].sum(-1),
    )
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    with torch.no_grad():
        stock = model(**inputs).logits
        silent = model(**{**inputs, "input_features": inputs["input_features"] * 0}).logits
        assert (stock - silent).abs().max() > 1e-2  # it does hear
        with AdaFV(keep=1.0)(model):
            torch.testing.assert_close(model(**inputs).logits, stock, **TOLERANCE)
        with AdaFV(keep=0.3)(model) as adafv:
            pruned = model(**inputs).logits
            mask = adafv.last.keep_mask.long()
            said = model.generate(**inputs, **options)
        expected = model(**{**inputs, "attention_mask": mask, "position_ids": positions}).logits
        [mine], [theirs] = kept_logits(pruned, mask), kept_logits(expected, mask)
        torch.testing.assert_close(mine, theirs, **TOLERANCE)
        along = (mask.cumsum(-1) - 1).clamp_min(0)[None]
        masked = {**inputs, "attention_mask": mask, "position_ids": torch.cat((along, positions))}
        wanted = model.generate(**masked, **options)
    assert said.sequences.tolist() == wanted.sequences.tolist()
    torch.testing.assert_close(torch.stack(said.logits), torch.stack(wanted.logits), **TOLERANCE)


@pytest.mark.parametrize("generates", [False, True])
def test_tracks_in_turns_are_refused(row: FamilyRow, generates: bool) -> None:
    """What the stock model makes of them depends on the lengths of the sounds."""
    model = row.build()
    inputs = make_inputs(row, model, [0], videos_per_prompt=[1])
    with AdaFV(keep=0.3)(model), pytest.raises(UnsupportedCallError, match="an audio of its own"):
        (model.generate if generates else model)(**inputs, use_audio_in_video=True)
    with torch.no_grad(), AdaFV(keep=0.3)(model):
        assert model(**inputs, use_audio_in_video=False).logits.isnan().any()


@pytest.mark.parametrize("name", MODULES)
def test_releases_with_the_tower_elsewhere_are_refused(name: str) -> None:
    module = importlib.import_module(name)
    if module.ROW is not None:
        assert hasattr(module.build().model, "get_image_features")
        return
    with pytest.raises(UnsupportedModelError, match="newer"), AdaFV(keep=0.3)(module.build()):
        pass


def test_seconds_between_frames_reach_the_positions(row: FamilyRow) -> None:
    """Also where a call sees only the second of two videos."""
    model = row.build()
    inputs = make_inputs(row, model, [0, 0], videos_per_prompt=[1, 1])
    inputs["video_second_per_grid"] = torch.tensor([0.5, 2.0])
    slower = {**inputs, "video_second_per_grid": torch.tensor([0.5, 3.0])}
    with AdaFV(keep=1.0)(model), torch.no_grad():
        logits, other = model(**inputs).logits, model(**slower).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**inputs).logits, **TOLERANCE)
    assert torch.equal(logits[0], other[0])
    assert (logits[1] - other[1]).abs().max() > 1e-3
    assert inputs["pixel_values_videos"].shape[-1] == 3 * 2 * PATCH**2
