"""LLaVA-NeXT-Video and Video-LLaVA: frames, their saliency and their budgets, and what the stock processors make of them."""

from typing import Any

import numpy
import pytest
import torch
from models import IMAGE, PATCH, SIDE, VIDEO, FamilyRow, make_inputs, noise
from oracle import STOCK_MIXES_UP_IMAGES, encoded_by_prompt, equal, masked_inputs
from processors import photo
from rows import llava_next_video, video_llava
from transformers import LlavaNextVideoProcessor, VideoLlavaImageProcessor, VideoLlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from adafv import AdaFV, Pruner, compress
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.families import family_of
from adafv.errors import PromptError, UnsupportedCallError, UnsupportedModelError

ROWS = [llava_next_video.ROW, video_llava.ROW]
FRAMES = 4


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> FamilyRow:
    return request.param


def clip(model: Any, frames: torch.Tensor) -> dict[str, Any]:
    """A prompt of four words about one video."""
    family = family_of(model)
    [layout] = family.layouts(model, "video", {"pixel_values_videos": frames[None]}, [])
    ids = torch.tensor([[1, 20, *[VIDEO] * layout.tokens, 21, 22, 23]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": frames[None]}


def of_video(model: Any, pixels: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """Layout and features of one video [frames, 3, H, W]."""
    family, visuals = family_of(model), {"pixel_values_videos": pixels[None], **options}
    layouts = family.layouts(model, "video", visuals, [])
    with torch.no_grad():
        return layouts[0], family.encode(model, "video", visuals, layouts, signals=frozenset({SALIENCY}))


# -------------------------------------------------------------------------------------------- saliency and layout


def heard_by_class_token(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[frames, rows, columns], from the stock eager attention maps of the layer in front of the last."""
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(pixels, output_attentions=True).attentions
    heard = maps[-2][:, :, 0, 1:].mean(1)
    side = int(heard.shape[1] ** 0.5)
    return heard.unflatten(1, (side, side))


@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize(("mode", "stride"), [("average", 2), ("max", 2), ("conv", 2), ("average", 1), ("average", 3)])
def test_pooled_saliency_is_the_mean_over_the_patches_of_a_token(mode: str, stride: int, side: int) -> None:
    """What is left over at the right and the bottom is dropped, as the resampler drops it."""
    model = llava_next_video.build(
        vision={"image_size": side * PATCH}, spatial_pool_mode=mode, spatial_pool_stride=stride
    )
    pixels = noise(1, FRAMES, 3, side * PATCH, side * PATCH)
    layout, encoded = of_video(model, pixels)
    with torch.no_grad():
        stock = model.model.get_video_features(pixels[None], return_dict=True).pooler_output
    assert torch.equal(encoded.features[0], stock[0].flatten(0, -2))
    heard = heard_by_class_token(model.model.vision_tower, pixels)
    expected = [
        heard[frame, stride * i : stride * (i + 1), stride * j : stride * (j + 1)].mean()
        for frame in range(FRAMES)
        for i in range(side // stride)
        for j in range(side // stride)
    ]
    torch.testing.assert_close(encoded.saliency[0], torch.stack(expected), atol=1e-6, rtol=1e-5)
    assert (layout.tokens, layout.crops, layout.rows) == (len(expected), FRAMES, side // stride)


def test_saliency_of_video_llava_is_that_of_the_video_tower() -> None:
    model = video_llava.build()
    pixels = noise(1, FRAMES, 3, SIDE, SIDE)
    layout, encoded = of_video(model, pixels)
    with torch.no_grad():
        stock = model.model.get_video_features(pixels[None], return_dict=True).pooler_output
    assert torch.equal(encoded.features[0], stock.flatten(0, 1))
    heard = heard_by_class_token(model.model.video_tower, pixels)
    torch.testing.assert_close(encoded.saliency[0][layout.shows_patch], heard.flatten(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("frame", "down", "across"), [(0, 0, 3), (2, 2, 1), (3, 3, 3)])
def test_a_patch_changes_the_token_that_the_layout_names(row: FamilyRow, frame: int, down: int, across: int) -> None:
    """Without attention the patches of a tower do not mix, so one patch changes one token."""
    model = row.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tower" in name and "out_proj.weight" in name:
                parameter.zero_()
    pixels = noise(1, FRAMES, 3, SIDE, SIDE)
    other = pixels.clone()
    other[frame, :, down * PATCH : (down + 1) * PATCH, across * PATCH : (across + 1) * PATCH] += 1
    layout, before = of_video(model, pixels)
    _, after = of_video(model, other)
    [changed] = (before.features[0] - after.features[0]).abs().amax(-1).gt(1e-6).nonzero().tolist()
    joined = SIDE // PATCH // layout.rows
    assert [int(place) for place in layout.place(torch.tensor(changed))] == [frame, down // joined, across // joined]


def test_class_tokens_of_frames_show_no_patch() -> None:
    """They are where the stock model puts them, and are kept only when all else is."""
    model = video_llava.build()
    patches = (SIDE // PATCH) ** 2
    pixels = noise(1, FRAMES, 3, SIDE, SIDE)
    layout, encoded = of_video(model, pixels)
    assert (~layout.shows_patch).nonzero().flatten().tolist() == [frame * (patches + 1) for frame in range(FRAMES)]
    with torch.no_grad():
        states = model.model.video_tower(pixels, output_hidden_states=True).hidden_states[-2]
        first = model.model.multi_modal_projector(states[:, 0])
    torch.testing.assert_close(encoded.features[0][~layout.shows_patch], first)
    for keep in (1, FRAMES * patches):
        record = compress(model, clip(model, pixels), keep=keep).record
        assert (record.crop[0] >= 0).all()
    record = compress(model, clip(model, pixels), keep=FRAMES * patches + 1).record
    assert (record.crop[0] < 0).nonzero().tolist() == [[0]]


def test_class_token_counts_to_the_frame_that_it_begins() -> None:
    model = video_llava.build()
    patches = (SIDE // PATCH) ** 2
    inputs = clip(model, noise(1, FRAMES, 3, SIDE, SIDE))
    record = compress(model, inputs, keep=patches, video="frame").record
    assert record.tokens_before == [patches + 1] * FRAMES
    for frame, (kept, crop) in enumerate(zip(record.kept, record.crop, strict=True)):
        assert kept.tolist() == list(range(1, patches + 1))  # all but its [CLS]
        assert record.frames[frame] == frame
        assert (crop == 0).all()
    dropped = (~record.keep_mask[0]).nonzero().flatten() - 2
    assert dropped.tolist() == [frame * (patches + 1) for frame in range(FRAMES)]


# ------------------------------------------------------------------- one budget for the clip, or one for every frame


def frames_kept(record: Any) -> list[int]:
    """Kept tokens of each frame."""
    found = torch.zeros(FRAMES, dtype=torch.long)
    for frame, crop in zip(record.frames, record.crop, strict=True):
        for place in crop[crop >= 0].tolist():
            found[place if frame is None else frame] += 1
    return found.tolist()


@pytest.mark.parametrize("frame", [0, 2])
def test_the_budget_of_a_clip_goes_to_the_frame_that_stands_out(row: FamilyRow, frame: int) -> None:
    """All frames are one grey but one: its patches are heard unevenly, so the loudest are louder than any of the grey."""
    model = row.build(vision={"hidden_size": 64})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embedding" in name:
                parameter.zero_()  # else places, not frames, stand out
    pixels = torch.zeros(FRAMES, 3, SIDE, SIDE)
    pixels[frame] = 2 * noise(3, 3, SIDE, SIDE)
    inputs = clip(model, pixels)
    whole = compress(model, inputs, keep=FRAMES // 2, method="saliency").record
    each = compress(model, inputs, keep=1, method="saliency", video="frame").record
    assert frames_kept(whole) == [FRAMES // 2 if number == frame else 0 for number in range(FRAMES)]
    assert frames_kept(each) == [1] * FRAMES


@pytest.mark.parametrize("method", ["text", "adafv"])
@pytest.mark.parametrize("frame", [1, 3])
def test_the_budget_of_a_clip_goes_to_the_frame_that_is_asked_for(row: FamilyRow, frame: int, method: str) -> None:
    """The words of the prompt are the visual tokens of one frame."""
    model = row.build()
    pixels = noise(5, FRAMES, 3, SIDE, SIDE)
    inputs = clip(model, pixels)
    layout, encoded = of_video(model, pixels)
    asked_for = (
        ((layout.source // (layout.rows * layout.columns) == frame) & layout.shows_patch).nonzero().flatten()[:4]
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[20:24] = encoded.features[0][asked_for]
    whole = compress(model, inputs, keep=4, method=method).record
    each = compress(model, inputs, keep=1, method=method, video="frame").record
    if method == "text":
        assert torch.equal(whole.kept[0], asked_for)
    assert frames_kept(whole)[frame] >= 3  # the saliency has a say too
    assert frames_kept(each) == [1] * FRAMES


def test_a_ratio_of_a_clip_is_a_ratio_of_its_frames(row: FamilyRow) -> None:
    """Both budgets keep as many tokens; which ones differs."""
    model = row.build()
    inputs = clip(model, noise(5, FRAMES, 3, SIDE, SIDE))
    whole = compress(model, inputs, keep=0.5).record
    each = compress(model, inputs, keep=0.5, video="frame").record
    assert abs(sum(whole.tokens_after) - sum(each.tokens_after)) <= FRAMES
    assert len(set(each.tokens_after)) == 1
    assert not torch.equal(whole.keep_mask, each.keep_mask)


# --------------------------------------------------------------------------------------- several videos in a prompt


@pytest.mark.pairs
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("videos", [[2], [2, 2], [2, 1], [1, 0, 2]])
@pytest.mark.parametrize("video", ["clip", "frame"])
def test_several_videos_in_a_prompt(row: FamilyRow, videos: list[int], video: str, mode: dict[str, Any]) -> None:
    model = row.build()
    inputs = make_inputs(row, model, [0] * len(videos), videos_per_prompt=videos)
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, **mode}
    options["suppress_tokens"] = [IMAGE, VIDEO]
    uneven = len({count for count in videos if count}) > 1
    if STOCK_MIXES_UP_IMAGES and mode and uneven and "video" in family_of(model).as_tensor:
        with AdaFV(keep=3, video=video)(model), pytest.raises(UnsupportedCallError, match="mixes up prompts"):
            model.generate(**inputs, **options)
        # Stock transformers does mix up the frames of a video: two sequences do not begin as one does.
        first = {
            **options,
            "num_beams": 1,
            "do_sample": True,
            "top_k": 1,
            "max_new_tokens": 1,
            "num_return_sequences": 1,
        }
        one = model.generate(**inputs, **first).logits[0].repeat_interleave(2, 0)
        two = model.generate(**inputs, **{**first, "num_return_sequences": 2}).logits[0]
        assert (one - two).abs().max() > 1e-2
        return
    torch.manual_seed(3)
    with AdaFV(keep=3, video=video)(model) as adafv:
        pruned = model.generate(**inputs, **options)
    budgets = sum(videos) * (row.clips[0] if video == "frame" else 1)
    assert adafv.last.tokens_after == [3] * budgets
    oracle = masked_inputs(inputs, adafv.last.keep_mask, row=row, model=model, generates=True)
    if STOCK_MIXES_UP_IMAGES and mode:
        oracle = encoded_by_prompt(model, oracle)
    torch.manual_seed(3)
    expected = model.generate(**oracle, **options)
    assert torch.equal(pruned.sequences, expected.sequences)
    for mine, theirs in zip(pruned.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


# ------------------------------------------------------------------------------------------------ options of a call


def test_feature_layer_of_the_call(row: FamilyRow) -> None:
    model, other = row.build(), row.build(vision_feature_layer=-3)
    inputs = make_inputs(row, model, [1], videos_per_prompt=[1])
    with torch.no_grad(), AdaFV(keep=0.3)(model), AdaFV(keep=0.3)(other):
        assert equal(model(**inputs, vision_feature_layer=-3).logits, other(**inputs).logits)


def test_layers_that_nothing_reads_do_not_run(row: FamilyRow) -> None:
    model = row.build()
    inputs = make_inputs(row, model, [0], videos_per_prompt=[1])
    ran: list[str] = []
    for name, module in model.named_modules():
        if "tower" in name and name.endswith("mlp"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad(), AdaFV(keep=3)(model):
        model(**inputs)
    tower = "video_tower" if row.name == "video-llava" else "vision_tower"
    assert [name.split(".")[1] for name in ran] == [tower] * 3
    assert [name.split(".")[-2] for name in ran] == ["0", "1", "2"]


def test_both_names_of_the_pixels_are_understood() -> None:
    """Older processors say pixel_values_images, newer ones can be told to say pixel_values."""
    model = video_llava.build()
    old = make_inputs(video_llava.ROW, model, [1])
    new = {**old, "pixel_values": old["pixel_values_images"]}
    del new["pixel_values_images"]
    with torch.no_grad(), AdaFV(keep=3)(model) as adafv:
        expected = model(**old).logits
        assert adafv.last.tokens_after == [3]
        assert equal(model(**new).logits, expected)
        sequences = model.generate(**old, max_new_tokens=3)
        assert torch.equal(model.generate(**new, max_new_tokens=3), sequences)
    family = family_of(model)
    for inputs in (old, new):
        named = {family.named(name): value for name, value in inputs.items()}
        assert torch.equal(family.view(model, named, []), old["pixel_values_images"])


def test_images_at_lower_resolution() -> None:
    model = video_llava.build()
    inputs = make_inputs(video_llava.ROW, model, [1, 1])
    with torch.no_grad(), Pruner("downsample", keep=4)(model) as pruner:
        model(**inputs)
    assert pruner.last.tokens_after == [4, 4]
    with Pruner("downsample", keep=4)(model), pytest.raises(UnsupportedCallError, match="lower resolution"):
        model(**make_inputs(video_llava.ROW, model, [0], videos_per_prompt=[1]))


# --------------------------------------------------------------------------------------------------- what is refused


def test_frames_that_are_not_square_are_refused() -> None:
    """The stock pooling takes 2 x 8 patches for 4 x 4, so tokens would be made of patches that are not neighbours."""
    model = llava_next_video.build()
    wide = {**clip(model, noise(1, FRAMES, 3, SIDE, SIDE)), "pixel_values_videos": noise(1, 1, FRAMES, 3, 28, 112)}
    with AdaFV(keep=3)(model), pytest.raises(UnsupportedCallError, match="square"):
        model(**wide)
    pooler = model.model.vision_resampler
    patches = torch.arange(16.0).view(1, 16, 1)  # 2 rows of 8
    assert pooler(patches).flatten()[0] == (0 + 1 + 4 + 5) / 4  # neighbours would be 0, 1, 8 and 9


def test_class_token_of_images_is_refused(row: FamilyRow) -> None:
    with pytest.raises(UnsupportedModelError, match="full"):
        AdaFV(keep=3)(row.build(vision_feature_select_strategy="full"))
    model = row.build()
    inputs = make_inputs(row, model, [1])
    with AdaFV(keep=3)(model), pytest.raises(UnsupportedModelError, match="full"):
        model(**inputs, vision_feature_select_strategy="full")


def test_prompt_that_does_not_fit_the_video(row: FamilyRow) -> None:
    model = row.build()
    inputs = clip(model, noise(1, FRAMES, 3, SIDE, SIDE))
    with AdaFV(keep=3)(model), pytest.raises(PromptError, match="visual tokens"):
        model(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, :-1]})


# -------------------------------------------------------------------------------------------------- stock processors


def stock_processor(cls: Any, image_processor: Any) -> Any:
    """One without a video processor, which would need torchvision; the counting of placeholders is in the class itself."""
    made = cls.__new__(cls)
    made.__dict__.update(
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token="I",
        video_token="V",
        image_processor=image_processor,
    )
    return made


@pytest.mark.parametrize("size", [(90, 100), (480, 640), (640, 480), (56, 56), (300, 70), (71, 301), (113, 112)])
def test_placeholders_of_the_stock_processors(row: FamilyRow, size: tuple[int, int]) -> None:
    model, family = row.build(), family_of(row.build())
    height, width = size
    crop = {"height": SIDE, "width": SIDE}
    if row.name == "video-llava":
        images = VideoLlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop)
        processor = stock_processor(VideoLlavaProcessor, images)
    else:
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=crop, image_grid_pinpoints=model.config.image_grid_pinpoints
        )
        processor = stock_processor(LlavaNextVideoProcessor, images)
    pixels = images(photo(0, width, height), return_tensors="pt")
    placeholders = processor.replace_image_token(pixels, 0)
    visuals = {family.named(name): value for name, value in pixels.items()}
    [layout] = family.layouts(model, "image", visuals, [])
    assert layout.tokens == len(placeholders)
    for frames in (1, 3, 8):
        video = {"pixel_values_videos": numpy.zeros((1, frames, 3, SIDE, SIDE), dtype=numpy.float32)}
        [layout] = family.layouts(model, "video", {name: torch.tensor(value) for name, value in video.items()}, [])
        assert layout.tokens == len(processor.replace_video_token(video, 0))
