"""Muse Glimmer, dots 3 note, DeepSeek-VL Hybrid: the saliency and the features belong to the token they are said to."""

from typing import Any

import pytest
import torch
from models import FAMILIES, PATCH, FamilyRow, make_inputs
from rows import cosmos3_edge
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from adafv import AdaFV, compress
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers import releases
from adafv.engines.transformers.families import family_of
from adafv.errors import PromptError, UnsupportedModelError

ROWS = {row.name: row for row in FAMILIES}
PACKED = [
    (name, modality) for name in ("muse-glimmer", "dots3-note") if name in ROWS for modality in ("image", "video")
]
EDGE = [name for name in ("cosmos3-edge",) if name in ROWS]
MERGE = 2


def recorded(attention: Any, run: Any) -> list[tuple[Tensor, Tensor]]:
    """(attention maps, values) of each run of one attention of the stock model."""
    runs: list[tuple[Tensor, Tensor]] = []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def recording(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        if module is attention:
            runs.append(((query @ key.transpose(-1, -2) * options["scaling"]).softmax(-1), value))
        return stock(module, query, key, value, *rest, **options)

    AttentionInterface.register("recording-values", recording)
    before = attention.config._attn_implementation
    attention.config._attn_implementation_internal = "recording-values"
    try:
        with torch.no_grad():
            run()
    finally:
        attention.config._attn_implementation_internal = before
    return runs


def sent(maps: Tensor, values: Tensor) -> Tensor:
    """[1, H, N, N], [1, H, N, d] -> [N], see docs/saliency.md."""
    differs = (values - values.mean(2, keepdim=True)).square().sum(-1)
    by_patch = (maps.mean(2) * differs).mean(1)[0]
    return by_patch / by_patch.sum()


def places_of_patches(row: FamilyRow, grids: list[list[int]]) -> list[tuple[int, int, int, int]]:
    """(image, frame, row, column) of the token that each patch of the inputs belongs to, as the processor writes them."""
    places = []
    for image, (frames, rows, columns) in enumerate(grids):
        for frame in range(frames):
            if row.name == "muse-glimmer":  # in reading order
                places += [(image, frame, y // MERGE, x // MERGE) for y in range(rows) for x in range(columns)]
            else:  # token by token
                tokens = [(image, frame, y, x) for y in range(rows // MERGE) for x in range(columns // MERGE)]
                places += [token for token in tokens for _ in range(MERGE**2)]
    return places


@pytest.mark.parametrize(("name", "modality"), PACKED)
def test_saliency_lines_up_with_the_attention_maps(name: str, modality: str) -> None:
    row = ROWS[name]
    model = row.build()
    if modality == "image":
        visuals, _ = row.images(model, [[size] for size in row.sizes], 0)
    else:
        visuals, _ = row.videos(model, [[count] for count in row.clips], 0)
    family = family_of(model)
    pixels, sizes = family.inputs(modality)
    layouts = family.layouts(model, modality, visuals, [])
    with torch.no_grad():
        encoded = family.encode(model, modality, visuals, layouts, signals=frozenset({SALIENCY}))
    tower = model.model.vision_tower
    layers = tower.layers if name == "muse-glimmer" else tower.blocks
    heard = layers[2]  # of Muse Glimmer the last that looks at the whole frame, of dots 3 note the last
    entered: list[Tensor] = []
    first = layers[0].register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    runs = recorded(heard.attn, lambda: tower(visuals[pixels], grid_thw=visuals[sizes]))
    first.remove()
    grids = visuals[sizes].tolist()
    order = order_in_tower(model, visuals[pixels], visuals[sizes], entered[0])
    assert len(runs) == sum(frames for frames, _, _ in grids)
    in_tower_order = torch.cat([sent(maps, values) for maps, values in runs])
    by_patch = torch.empty_like(in_tower_order)
    by_patch[order] = in_tower_order
    expected: dict[tuple[int, int, int, int], float] = {}
    for place, score in zip(places_of_patches(row, grids), by_patch.tolist(), strict=True):
        expected[place] = expected.get(place, 0.0) + score / MERGE**2
    for image, (layout, saliency) in enumerate(zip(layouts, encoded.saliency, strict=True)):
        frames, rows, columns = (part.tolist() for part in layout.place(torch.arange(layout.tokens)))
        wanted = [expected[image, frame, y, x] for frame, y, x in zip(frames, rows, columns, strict=True)]
        torch.testing.assert_close(saliency, torch.tensor(wanted), atol=1e-6, rtol=1e-4)


def order_in_tower(model: Any, pixels: Tensor, sizes: Tensor, entered: Tensor) -> Tensor:
    """Which patch of the inputs stands at each place of the tower's row: found by its embedding."""
    tower = model.model.vision_tower
    with torch.no_grad():
        if hasattr(tower, "patch_embedder"):
            embedded = tower.ln_pre(tower.patch_embedder(pixels, sizes))
        else:
            embedded = tower.patch_embed(pixels)
    return torch.cdist(entered, embedded).argmin(-1)


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in PACKED))
@pytest.mark.parametrize("number", [0, 7, 13, 30])
def test_a_patch_changes_the_token_that_the_layout_names(name: str, number: int) -> None:
    """Without attention the patches of a tower do not mix, so one patch changes one token."""
    row = ROWS[name]
    model = row.build()
    with torch.no_grad():
        for parameter_name, parameter in model.model.vision_tower.named_parameters():
            if ".attn.proj." in parameter_name:
                parameter.zero_()
    visuals, _ = row.images(model, [[(84, 112), (112, 84)]], 0)
    family = family_of(model)
    layouts = family.layouts(model, "image", visuals, [])
    other = {**visuals, "pixel_values": visuals["pixel_values"].clone()}
    number += 48  # in the second image
    other["pixel_values"][number] += 1
    with torch.no_grad():
        one, two = (
            family.encode(model, "image", entries, layouts, signals=frozenset()).features
            for entries in (visuals, other)
        )
    assert torch.equal(one[0], two[0])
    [changed] = (one[1] - two[1]).abs().amax(-1).gt(1e-6).nonzero().tolist()
    place = [int(part) for part in layouts[1].place(torch.tensor(changed))]
    assert (1, *place) == places_of_patches(row, visuals["image_grid_thw"].tolist())[number]


@pytest.mark.parametrize("name", dict.fromkeys([*(name for name, _ in PACKED), *EDGE]))
def test_the_image_is_shown_as_it_is(name: str) -> None:
    """Patches as the processor would write them, put together again."""
    model = ROWS[name].build()
    picture = torch.randn(3, 4 * PATCH, 6 * PATCH)
    if name == "muse-glimmer":
        patches = picture.view(3, 4, PATCH, 6, PATCH).permute(1, 3, 0, 2, 4)
        patches = patches.unsqueeze(2).expand(-1, -1, 2, -1, -1, -1)
    else:
        patches = picture.view(3, 2, MERGE, PATCH, 3, MERGE, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
        patches = patches.permute(0, 1, 2, 3, 5, 6, 4) if name == "cosmos3-edge" else patches  # colours last
    visuals = {"pixel_values": patches.reshape(24, -1), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    family = family_of(model)
    layouts = family.layouts(model, "image", visuals, [])
    assert torch.equal(family.view(model, visuals, layouts)[0], picture)


def test_a_release_that_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "COUNTS_ALONG_COSMOS_PROMPTS", False)
    with pytest.raises(UnsupportedModelError, match="beside those in time, height and width; run: pip install"):
        family_of(cosmos3_edge.build())


def test_a_tower_of_windows_alone_is_refused() -> None:
    model = ROWS["muse-glimmer"].build()
    model.config.vision_config.layer_types = ["window_attention"] * 4
    with pytest.raises(UnsupportedModelError, match="full_attention"):
        AdaFV(keep=3)(model)


def test_saliency_of_the_low_resolution_tower() -> None:
    row = ROWS["deepseek-vl-hybrid"]
    model = row.build()
    inputs = make_inputs(row, model, [2])
    record = compress(model, inputs, keep=3).record
    tower = model.model.vision_model
    attention = tower.encoder.layers[-1].self_attn
    [(maps, values)] = recorded(attention, lambda: tower(inputs["pixel_values"]))
    for number, saliency in enumerate(record.saliency):
        expected = sent(maps[number : number + 1], values[number : number + 1])
        torch.testing.assert_close(saliency, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("entry", ["pixel_values", "high_res_pixel_values"])
def test_both_resolutions_count(entry: str) -> None:
    """What either tower sees goes into the features; the other image's stay."""
    row = ROWS["deepseek-vl-hybrid"]
    model = row.build()
    visuals, _ = row.images(model, [row.sizes[:2]], 0)
    family = family_of(model)
    layouts = family.layouts(model, "image", visuals, [])
    other = {**visuals, entry: visuals[entry].clone()}
    other[entry][1] += 1
    with torch.no_grad():
        one, two = (
            family.encode(model, "image", entries, layouts, signals=frozenset()).features
            for entries in (visuals, other)
        )
    torch.testing.assert_close(one[0], two[0], atol=1e-6, rtol=1e-6)
    assert (one[1] - two[1]).abs().max() > 1e-2


@pytest.mark.parametrize("high", [0, 1, None])
def test_images_at_one_resolution_alone_are_refused(high: int | None) -> None:
    """The stock model refuses them too, or mixes up the images."""
    row = ROWS["deepseek-vl-hybrid"]
    model = row.build()
    inputs = make_inputs(row, model, [2])
    if high is None:
        del inputs["high_res_pixel_values"]
    else:
        inputs["high_res_pixel_values"] = inputs["high_res_pixel_values"][:high]
    with torch.no_grad():
        with pytest.raises((ValueError, RuntimeError)):
            model(**inputs)
        with AdaFV(keep=3)(model), pytest.raises(PromptError, match="as the processor returns them"):
            model(**inputs)
