"""The stages of training: what each one trains, on which batches, for what.

The recipe is LLaVA's: a tower that has learned from captions, a language model that has learned from text, the
projector alone between them, then all together. The first two do not need each other and run side by side.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from adafv.evaluation.world.details import with_tags
from adafv.evaluation.world.scenes import Box, Scene
from training import attention
from training.architecture import SIDE, VISUAL_TOKENS, WIDTH, llava_config, llava_next_config
from training.batches import Batches, moved, normalised, pixels
from training.conversations import Conversations, converse
from training.language import GridEmbedding, SceneText, scene_grid, scene_list
from training.losses import Alignment, Shown, View, answer_loss, quarters, shown, whole

SEED = 20251


class Pupil(nn.Module):
    """The model, and what only training needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.llava = LlavaForConditionalGeneration(llava_config())
        self.newline = nn.Parameter(torch.randn(WIDTH) * WIDTH**-0.5)
        self.alignment = Alignment()
        self.grid = GridEmbedding()
        self.words = self.llava.model.language_model.embed_tokens
        nn.init.normal_(self.words.weight, std=WIDTH**-0.5)
        # Queries and keys start alike, so that from the first step a word attends to what resembles it: "key" in a
        # question to the patches that hold "key". The first answers that need such a match came in fewer steps with it.
        for layer in self.llava.model.language_model.layers:
            nn.init.normal_(layer.self_attn.q_proj.weight, std=WIDTH**-0.5)
            layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
        self.llava.set_attn_implementation(
            {"text_config": attention.NAME, "vision_config": attention.NAME, "": "eager"}
        )
        # The twin's own code packs its crops; its weights are not used.
        with torch.device("meta"):
            self._next = [LlavaNextForConditionalGeneration(llava_next_config())]

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Projected visual tokens [images, patches, WIDTH] and pooled [CLS] [images, WIDTH] of uint8 pictures."""
        output = self.llava.model.vision_tower(normalised(images))
        return self.llava.model.multi_modal_projector(output.last_hidden_state[:, 1:]), output.pooler_output

    def pack(self, crops: Tensor) -> Tensor:
        """The visual tokens of LLaVA-NeXT [images, tokens, WIDTH] from those of 1 + 4 crops [images, 5, patches, WIDTH]."""
        sizes = torch.tensor([[2 * SIDE, 2 * SIDE]] * len(crops))
        packed, _ = self._next[0].model.pack_image_features(list(crops), sizes, "default", self.newline.to(crops.dtype))
        return torch.stack(list(packed))


@dataclass(frozen=True)
class Outcome:
    loss: Tensor
    measure: Callable[[], dict[str, float]]

    @property
    def figures(self) -> dict[str, float]:
        """For the log. Asking waits for the device, so ask when the step is done."""
        return self.measure()


@dataclass(frozen=True)
class Stage:
    name: str
    summary: str
    size: int
    """Scenes a batch."""
    steps: int
    trained: tuple[str, ...]
    """Prefixes of the parameters of `Pupil` that are trained."""
    make: Callable[[list[Scene], Random], Any]
    learn: Callable[[Pupil, Any], Outcome]
    rate: float = 2e-3
    """Peak learning rate of matrices inside layers."""
    other_rate: float = 2e-3
    """Of embeddings, norms and biases."""
    needs: tuple[str, ...] = ()
    """Stages whose weights it starts from."""
    position_rate: float | None = None
    """Of the tower's position embeddings, where another one."""
    prepare: Callable[[Pupil], None] = lambda pupil: None
    """Done once, before the first step."""

    def parameters(self, pupil: Pupil) -> Iterable[tuple[str, nn.Parameter]]:
        for name, parameter in pupil.named_parameters():
            parameter.requires_grad_(name.startswith(self.trained))
        return pupil.named_parameters()


LANGUAGE, TOWER, PROJECTOR = "llava.model.language_model.layers", "llava.model.vision_tower", "llava.model.multi_modal"
NORM, WORDS = "llava.model.language_model.norm", "llava.model.language_model.embed"


def _language(pupil: Pupil, text: SceneText) -> Outcome:
    visual = pupil.grid(text, pupil.words)
    return Outcome(*_answers(pupil, visual, text.conversations))


DETAILS = 1 / 3
"""Share of the language model's batches, and of the tower's, that have details."""


def _list_text(scenes: list[Scene], random: Random) -> SceneText:
    return scene_list(_sometimes_detailed(scenes, random), random)


def _grid_text(scenes: list[Scene], random: Random) -> SceneText:
    return scene_grid(_sometimes_detailed(scenes, random), random)


def _sometimes_detailed(scenes: list[Scene], random: Random) -> list[Scene]:
    return [with_tags(scene) for scene in scenes] if random.random() < DETAILS else scenes


@dataclass(frozen=True)
class Pictures:
    images: Tensor
    """[pictures, 3, SIDE, SIDE] uint8."""
    shown: Shown


def _pictures(scenes: list[Scene], random: Random) -> Pictures:
    """Whole scenes, or all quarters of a fourth of them, with details."""
    if random.random() < DETAILS:
        detailed = [with_tags(scene) for scene in scenes[: max(1, len(scenes) // 4)]]
        images, boxes = pixels(detailed, random, 2 * SIDE)
        views = [view for scene, found in zip(detailed, boxes, strict=True) for view in quarters(scene, found)]
        return Pictures(_quarters(images).flatten(0, 1), shown(views, random))
    images, boxes = pixels(scenes, random)
    return Pictures(images, shown([*map(whole, scenes, boxes)], random))


def _quarters(images: Tensor) -> Tensor:
    """[scenes, 4, 3, SIDE, SIDE], in reading order, of pictures twice as large."""
    return images.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def _tower(pupil: Pupil, batch: Pictures) -> Outcome:
    visual, pooled = pupil.see(batch.images)
    patch_loss, class_loss = pupil.alignment(pupil.words.weight, visual, pooled, batch.shown)
    prefix = "" if batch.shown.marks is None else "crops "
    return Outcome(
        patch_loss + 0.1 * class_loss,
        lambda: {f"{prefix}patches": patch_loss.item(), f"{prefix}class": class_loss.item()},
    )


@dataclass(frozen=True)
class Lesson:
    images: Tensor
    """[scenes, 3, SIDE, SIDE] uint8."""
    shown: Shown
    text: SceneText


@dataclass(frozen=True)
class LessonInCrops:
    """For the twin."""

    images: Tensor
    """[scenes, 5, 3, SIDE, SIDE] uint8: the thumbnail, then the quarters."""
    shown: Shown
    """In all of these."""
    talk: Conversations


NEXT_EVERY = 3
"""One batch in so many teaches the twin with several crops, every other of these on scenes with details."""


def lesson(scenes: list[Scene], random: Random, crops: int | None = None) -> Lesson | LessonInCrops:
    """A lesson for the model or, now and then, for its twin, on the first `crops` of the scenes (a sixth by default:
    what takes as long on a CPU)."""
    if random.random() < 1 / NEXT_EVERY:
        return _lesson_in_crops(scenes[: crops or max(1, len(scenes) // 6)], random)
    return _plain_lesson(scenes, random)


def _lesson_in_crops(scenes: list[Scene], random: Random) -> LessonInCrops:
    if random.random() < 0.5:
        scenes = [with_tags(scene) for scene in scenes]
    images, boxes = pixels(scenes, random, 2 * SIDE)
    small = images.view(len(scenes), 3, SIDE, 2, SIDE, 2).float().mean((3, 5)).round().to(torch.uint8)
    crops = torch.cat((small[:, None], _quarters(images)), dim=1)
    views: list[View] = []
    for scene, found in zip(scenes, boxes, strict=True):
        thumbnail: list[Box] = [(left // 2, top // 2, right // 2, bottom // 2) for left, top, right, bottom in found]
        views += [whole(scene, thumbnail), *quarters(scene, found)]
    return LessonInCrops(crops, shown(views, random), converse(scenes, random, NEXT_TOKENS, early=True))


def _plain_lesson(scenes: list[Scene], random: Random) -> Lesson:
    images, boxes = pixels(scenes, random)
    return Lesson(images, shown([*map(whole, scenes, boxes)], random), scene_grid(scenes, random))


NEXT_TOKENS = VISUAL_TOKENS + 4 * VISUAL_TOKENS + 2 * int(VISUAL_TOKENS**0.5)
"""The thumbnail, four crops, and a newline at the end of every row of theirs."""


@torch.no_grad()
def _to_scale(pupil: Pupil) -> None:
    """Shrink the visual tokens to the length of the words.

    Contrast asks for directions alone and leaves tokens twenty times as long as words, beside which nothing that a layer
    adds would count.
    """
    lesson = moved(Batches(_plain_lesson, size=32, count=1)[0], pupil.newline.device)
    visual, _ = pupil.see(lesson.images)
    written = pupil.grid(lesson.text, pupil.words)
    factor = written.norm(dim=-1).mean() / visual.norm(dim=-1).mean()
    last = pupil.llava.model.multi_modal_projector.linear_2
    last.weight *= factor
    last.bias *= factor


def _together(pupil: Pupil, lesson: Lesson | LessonInCrops) -> Outcome:
    if isinstance(lesson, LessonInCrops):
        visual, pooled = pupil.see(lesson.images.flatten(0, 1))
        crops = visual.unflatten(0, lesson.images.shape[:2])
        loss, answers = _answers(pupil, pupil.pack(crops), lesson.talk)
        patch_loss, class_loss = pupil.alignment(pupil.words.weight, visual, pooled, lesson.shown)
        return Outcome(
            loss + 0.3 * patch_loss + 0.03 * class_loss,
            lambda: {f"next {name}": figure for name, figure in (answers() | {"patches": patch_loss.item()}).items()},
        )
    visual, pooled = pupil.see(lesson.images)
    loss, answers = _answers(pupil, visual, lesson.text.conversations)
    patch_loss, class_loss = pupil.alignment(pupil.words.weight, visual, pooled, lesson.shown)
    # What the language model has learned to read.
    written = pupil.grid(lesson.text, pupil.words).detach()
    distance = (visual - written).square().sum(-1).mean()
    return Outcome(
        loss + 0.3 * patch_loss + 0.03 * class_loss + 2.0 * distance,
        lambda: answers() | {"patches": patch_loss.item(), "class": class_loss.item(), "distance": distance.item()},
    )


def _answers(pupil: Pupil, visual: Tensor, talk: Conversations) -> tuple[Tensor, Callable[[], dict[str, float]]]:
    loss, right, chosen = answer_loss(pupil.llava.model.language_model, pupil.words, visual, talk)

    def figures() -> dict[str, float]:
        answered = torch.zeros(chosen.shape, dtype=torch.bool)
        answered[chosen.cpu()] = right.cpu()
        found_at = answered.tolist()
        by_kind: dict[str, list[bool]] = {}
        for row, asked in enumerate(talk.kinds):
            for place, kind in asked:
                by_kind.setdefault(kind, []).append(found_at[row][place])
        shares = {kind: sum(found) / len(found) for kind, found in by_kind.items()}
        return {"answers": loss.item(), **shares}

    return loss, figures


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "tower", "tower and projector, with captions", 64, 1400, (TOWER, PROJECTOR, "alignment"), _pictures, _tower
        ),
        Stage("list", "language model, on scenes as lists", 32, 900, (LANGUAGE, NORM, "grid"), _list_text, _language),
        Stage(
            "grid",
            "language model, on scenes as grids",
            32,
            400,
            (LANGUAGE, NORM, "grid"),
            _grid_text,
            _language,
            needs=("list",),
        ),
        Stage(
            "projector",
            "projector alone",
            32,
            120,
            (PROJECTOR,),
            lesson,
            _together,
            needs=("tower", "grid"),
            prepare=_to_scale,
        ),
        Stage(
            "together",
            "all together",
            32,
            4000,
            (LANGUAGE, NORM, WORDS, TOWER, PROJECTOR, "alignment", "newline"),
            lesson,
            _together,
            rate=1e-3,
            other_rate=3e-4,
            # Where a patch lies did not matter to the tower's own stage, which all but forgot it.
            position_rate=2e-3,
            needs=("projector",),
        ),
    )
}
