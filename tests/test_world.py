"""The generated world: pictures show what the facts say, and every question about them has one right answer."""

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import combinations
from random import Random

import numpy
import pytest
from drawn import examples
from facts import right_answer
from hypothesis import given
from hypothesis import strategies as st

from adafv.evaluation.world import details
from adafv.evaluation.world.backgrounds import _PHOTOS, TEXTURES, photographs_installed
from adafv.evaluation.world.details import (
    CELL,
    DETAIL_KINDS,
    FINE,
    LETTERS,
    MARKS,
    PATTERNS,
    DetailedScene,
    ask_detail,
    sample_detailed_scene,
    with_tags,
)
from adafv.evaluation.world.objects import COLOURS, KINDS, draw
from adafv.evaluation.world.questions import QUESTION_KINDS, a, ask, caption, plural
from adafv.evaluation.world.scenes import HELD_OUT, SPLITS, Box, Scene, render, sample_scene
from training.vocabulary import UNKNOWN, tokenizer, words

SIDE = 144
splits = st.sampled_from(SPLITS)
numbers = st.integers(0, 10**9)
scenes = st.builds(sample_scene, splits, numbers, photos=st.just(False))
seeds = st.integers(0, 2**32)
few = examples(40)  # each draws pictures
many = examples(200)


def some(split: str, count: int) -> list[Scene]:
    return [sample_scene(split, number, photos=False) for number in range(count)]


class TestScenes:
    def test_no_two_are_alike_in_or_between_splits(self) -> None:
        # photos=True names backgrounds, it does not paint them: nothing needs to be installed.
        facts = [
            (scene.things, scene.background_seed)
            for split in SPLITS
            for photos in (False, True)
            for scene in (sample_scene(split, number, photos=photos) for number in range(150))
        ]
        assert len(set(facts)) == len(facts) == 150 * 2 * len(SPLITS)

    @given(splits, numbers)
    @few
    def test_a_number_is_a_scene(self, split: str, number: int) -> None:
        one, two = (sample_scene(split, number, photos=False) for _ in range(2))
        assert one == two
        (first, first_boxes), (second, second_boxes) = render(one, SIDE), render(two, SIDE)
        assert first.tobytes() == second.tobytes()
        assert first_boxes == second_boxes

    @given(splits, numbers)
    @many
    def test_held_out_pairs_are_seen_in_the_test_split_only(self, split: str, number: int) -> None:
        kinds = {thing.kind for thing in sample_scene(split, number, photos=False).things}
        shown = [pair for pair in HELD_OUT if pair <= kinds]
        assert bool(shown) == (split == "test")

    def test_every_kind_is_seen_in_training(self) -> None:
        """Else the test split would ask for what nobody could know."""
        things = [thing for scene in some("train", 300) for thing in scene.things]
        assert {thing.kind for thing in things} == set(KINDS)
        assert {thing.colour for thing in things} == set(COLOURS)

    @given(scenes)
    @many
    def test_large_and_striking_or_small_and_faint(self, scene: Scene) -> None:
        large = [thing for thing in scene.things if not thing.faint]
        faint = [thing for thing in scene.things if thing.faint]
        assert large
        assert faint
        assert max(thing.size for thing in faint) < min(thing.size for thing in large)
        assert all(thing.opacity == 1 for thing in large)

    @given(scenes)
    @many
    def test_at_most_four_of_a_kind(self, scene: Scene) -> None:
        """There are words for no more."""
        assert max(Counter(thing.kind for thing in scene.things).values()) <= 4


def area(box: Box) -> int:
    left, top, right, bottom = box
    return max(0, right - left) * max(0, bottom - top)


class TestPictures:
    @given(scenes, seeds)
    @few
    def test_boxes_hold_what_was_drawn(self, scene: Scene, seed: int) -> None:
        """Take one thing away: the pixels that change lie in its box, and reach to near its edges."""
        number = seed % len(scene.things)
        picture, boxes = render(scene, SIDE)
        without, _ = render(replace(scene, things=scene.things[:number] + scene.things[number + 1 :]), SIDE)
        changed = (numpy.asarray(picture) != numpy.asarray(without)).any(-1)
        left, top, right, bottom = boxes[number]
        inside = changed[top:bottom, left:right]
        assert inside.sum() == changed.sum()
        assert inside.mean() > 0.1
        assert inside.any(1).mean() > 0.9
        assert inside.any(0).mean() > 0.9

    @given(scenes)
    @few
    def test_boxes_lie_where_the_facts_say(self, scene: Scene) -> None:
        for thing, (left, top, right, bottom) in zip(scene.things, render(scene, SIDE)[1], strict=True):
            assert (left + right) / 2 == pytest.approx(thing.x * SIDE, abs=2)
            assert (top + bottom) / 2 == pytest.approx(thing.y * SIDE, abs=2)
            assert max(right - left, bottom - top) == pytest.approx(thing.size * SIDE, abs=2)

    @given(scenes)
    @few
    def test_no_two_things_hide_each_other(self, scene: Scene) -> None:
        for one, two in combinations(render(scene, SIDE)[1], 2):
            shared = (max(one[0], two[0]), max(one[1], two[1]), min(one[2], two[2]), min(one[3], two[3]))
            assert area(shared) <= 0.12 * min(area(one), area(two))

    @given(scenes)
    @few
    def test_faint_things_stand_out_less(self, scene: Scene) -> None:
        """A pixel of a faint thing is a mixture of its colour and of what is behind it."""
        picture, boxes = render(scene, SIDE)
        opaque, _ = render(replace(scene, things=tuple(replace(thing, opacity=1.0) for thing in scene.things)), SIDE)
        bare, _ = render(replace(scene, things=()), SIDE)
        drawn, full, ground = (numpy.asarray(image, dtype=float) for image in (picture, opaque, bare))
        for thing, (left, top, right, bottom) in zip(scene.things, boxes, strict=True):
            if thing.faint:
                place = slice(top, bottom), slice(left, right)
                assert numpy.abs(drawn[place] - ground[place]).sum() < numpy.abs(full[place] - ground[place]).sum()

    @given(scenes)
    @few
    def test_the_same_picture_at_every_size(self, scene: Scene) -> None:
        small, large = render(scene, SIDE)[0], render(scene, 3 * SIDE)[0].reduce(3)
        difference = numpy.asarray(small, dtype=float) - numpy.asarray(large, dtype=float)
        assert numpy.abs(difference).mean() < 8

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_has_its_colour(self, kind: str) -> None:
        """Most pixels are nearer to the object's own colour than to any other."""
        for name, colour in COLOURS.items():
            pixels = numpy.asarray(draw(kind, colour, 90)).reshape(-1, 4)
            solid = pixels[pixels[:, 3] > 250, :3].astype(float)
            # Outlines are the colour's own shade, so brightness says little about which colour it is.
            nearest = Counter(
                min(COLOURS, key=lambda other: float(((pixel - COLOURS[other]) ** 2).sum())) for pixel in solid[::7]
            )
            assert nearest.most_common(1)[0][0] in (name, "brown"), nearest
            assert nearest[name] > 0.25 * nearest.total()

    def test_textures_alone_where_there_are_no_photographs(self) -> None:
        for split in SPLITS:
            assert {scene.background for scene in some(split, 100)} == set(TEXTURES)
        assert "photo" in {sample_scene("train", number).background for number in range(100)}

    @pytest.mark.skipif(not photographs_installed(), reason="scikit-image is not installed (extra `train`)")
    @pytest.mark.parametrize("split", SPLITS)
    def test_photographs(self, split: str) -> None:
        found = (sample_scene(split, number) for number in range(1000))
        scene = next(scene for scene in found if scene.background == "photo")
        picture, boxes = render(scene, SIDE)
        assert picture.size == (SIDE, SIDE)
        assert len(boxes) == len(scene.things)

    def test_photographs_of_the_test_split_are_others(self) -> None:
        assert not set(_PHOTOS["train"]) & set(_PHOTOS["test"])


class TestQuestions:
    @pytest.mark.parametrize("kind", QUESTION_KINDS)
    @given(scenes, seeds)
    @many
    def test_the_answer_is_right_and_the_only_one(self, kind: str, scene: Scene, seed: int) -> None:
        question = ask(scene, Random(seed), kind)
        if question is not None:
            assert question.kind == kind
            assert question.answer == right_answer(scene, question.text)

    @given(scenes, seeds)
    @many
    def test_every_scene_can_be_asked_about(self, scene: Scene, seed: int) -> None:
        question = ask(scene, Random(seed))
        assert question is not None
        assert set(question.things) <= set(scene.things)
        assert question.faint == any(thing.opacity < 1 for thing in question.things)

    @pytest.mark.parametrize("kind", ["presence", "relation"])
    def test_yes_is_as_frequent_as_no(self, kind: str) -> None:
        random = Random(0)
        asked = [ask(scene, random, kind) for scene in some("train", 500) for _ in range(4)]
        answers = Counter(question.answer for question in asked if question is not None)
        assert answers["yes"] / (answers["yes"] + answers["no"]) == pytest.approx(0.5, abs=0.04)

    def test_no_is_not_told_by_the_question_alone(self) -> None:
        """Of every kind of object, both answers occur."""
        random = Random(0)
        asked = [ask(scene, random, "presence") for scene in some("train", 500) for _ in range(8)]
        said = {(question.text.rstrip("?").split()[-1], question.answer) for question in asked if question is not None}
        assert said == {(kind, answer) for kind in KINDS for answer in ("yes", "no")}

    def test_the_most_frequent_answer_is_not_worth_much(self) -> None:
        random, scenes = Random(0), some("train", 500)
        for kind, most in (("colour", 0.2), ("counting", 0.45), ("size", 0.1), ("background", 0.35)):
            asked = [ask(scene, random, kind) for scene in scenes for _ in range(2)]
            answers = Counter(question.answer for question in asked if question is not None)
            assert answers.most_common(1)[0][1] / answers.total() < most, (kind, answers)

    def test_faint_objects_are_asked_about(self) -> None:
        random = Random(0)
        asked = [ask(scene, random) for scene in some("test", 300)]
        assert 0.3 < sum(question.faint for question in asked if question is not None) / len(asked) < 0.8

    @given(scenes, seeds)
    @many
    def test_captions_name_every_large_object(self, scene: Scene, seed: int) -> None:
        text = caption(scene, Random(seed))
        said, background = text.rsplit(" on ", 1)
        assert background == scene.background
        large = Counter((thing.colour, thing.kind) for thing in scene.things if not thing.faint)
        for (colour, kind), count in large.items():
            named = a(f"large {colour} {kind}") if count == 1 else f"large {colour} {plural(kind)}"
            assert named in said
        assert said.count("large") == len(large)

    @given(scenes, seeds)
    @many
    def test_no_word_is_unknown(self, scene: Scene, seed: int) -> None:
        """And the tokenizer gives every text back as it was."""
        random, words = Random(seed), tokenizer()
        question = ask(scene, random)
        assert question is not None
        for text in (question.text, question.answer, caption(scene, random)):
            ids = words.encode(text, add_special_tokens=False)
            assert UNKNOWN not in ids
            assert words.decode(ids) == text


class TestOldScenes:
    """What was published was measured on these: they stay what they were, whatever the world learns."""

    def test_facts_and_questions_are_what_they_were(self) -> None:
        told = hashlib.sha256()
        for split in SPLITS:
            for number in range(40):
                for photos in (False, True):
                    scene, random = sample_scene(split, number, photos=photos), Random(number)
                    told.update(repr(scene).encode())
                    for kind in QUESTION_KINDS:
                        told.update(repr(ask(scene, random, kind)).encode())
                    told.update(caption(scene, random).encode())
        assert told.hexdigest() == "31333027744a670f40b367247a2cc414eb35eb8c14821050d1175572b89d5913"

    @pytest.mark.parametrize(
        ("split", "levels"),
        [
            ("train", [[103.1, 99.5], [91.1, 90.2]]),
            ("validation", [[171.3, 164.8], [157.3, 170.3]]),
            ("test", [[200.5, 196.3], [190.7, 196.0]]),
        ],
    )
    def test_pictures_are_what_they_were(self, split: str, levels: list[list[float]]) -> None:
        """Mean of each quarter: bits may differ between versions of Pillow and NumPy."""
        picture = numpy.asarray(render(sample_scene(split, 0, photos=False), SIDE)[0], dtype=float)
        assert picture.reshape(2, 72, 2, 72, 3).mean((1, 3, 4)) == pytest.approx(numpy.array(levels), abs=0.3)

    def test_words_have_the_ids_that_they_had(self) -> None:
        assert hashlib.sha256(repr(words()[:91]).encode()).hexdigest() == (
            "1d796fc131bdbe949522d37183c7de51b4d2331155829d84ba055977221faed2"
        )


detailed = st.builds(sample_detailed_scene, splits, numbers, photos=st.just(False))


class TestDetails:
    @given(splits, numbers)
    @few
    def test_a_number_is_a_scene(self, split: str, number: int) -> None:
        one, two = (sample_detailed_scene(split, number, photos=False) for _ in range(2))
        assert one == two
        assert details.render(one, FINE)[0].tobytes() == details.render(two, FINE)[0].tobytes()
        assert with_tags(sample_scene(split, number, photos=False)).things != one.things

    @given(detailed)
    @few
    def test_a_tag_lies_on_its_thing_and_is_all_that_differs(self, scene: DetailedScene) -> None:
        plain = Scene(scene.split, scene.number, scene.things, scene.background, scene.background_seed)
        picture, boxes = details.render(scene, FINE)
        without, plain_boxes = details.render(plain, FINE)
        assert boxes == plain_boxes
        changed = (numpy.asarray(picture) != numpy.asarray(without)).any(-1)
        for tag, (left, top, right, bottom) in zip(scene.tags, boxes, strict=True):
            x, y = tag.middle
            assert left <= x < right
            assert top <= y < bottom
            changed[max(0, tag.top) : tag.top + CELL, max(0, tag.left) : tag.left + CELL] = False
        assert not changed.any()

    @given(detailed)
    @few
    def test_what_is_written_lies_in_one_patch_of_one_crop(self, scene: DetailedScene) -> None:
        for tag in scene.tags:
            rows, columns = numpy.nonzero(details._drawn(tag.mark) < 200)
            if tag.mark in LETTERS:
                assert len({(tag.left + int(edge)) // CELL for edge in (columns.min(), columns.max())}) == 1
                assert len({(tag.top + int(edge)) // CELL for edge in (rows.min(), rows.max())}) == 1

    def test_patterns_are_one_grey_in_the_thumbnail(self) -> None:
        """Wherever they lie: halved, nothing tells one from another."""
        scene = sample_detailed_scene("train", 0, photos=False)
        for left, top in ((60, 60), (61, 60), (60, 61), (61, 61)):
            inside = slice(top // 2 + 1, top // 2 + CELL // 2 - 1), slice(left // 2 + 1, left // 2 + CELL // 2 - 1)
            seen = set()
            for mark in PATTERNS:
                tags = tuple(replace(tag, mark=mark, left=left, top=top) for tag in scene.tags)
                thumbnail, _ = details.render(replace(scene, tags=tags), FINE // 2)
                seen.add(numpy.asarray(thumbnail)[inside].tobytes())
            assert len(seen) == 1

    def test_marks_differ_in_crops(self) -> None:
        assert len({details._drawn(mark).tobytes() for mark in MARKS}) == len(MARKS)

    def test_sizes_that_would_blur_tags_are_refused(self) -> None:
        with pytest.raises(ValueError, match="multiple of 288, not 432"):
            details.render(sample_detailed_scene("test", 0, photos=False), 432)

    @pytest.mark.parametrize("kind", DETAIL_KINDS)
    @given(detailed, seeds)
    @many
    def test_the_answer_is_right_and_the_only_one(self, kind: str, scene: DetailedScene, seed: int) -> None:
        question = ask_detail(scene, Random(seed), kind)
        if question is not None:
            assert question.kind == kind
            assert question.answer == right_answer(scene, question.text)
            ids = tokenizer().encode(f"{question.text} {question.answer}", add_special_tokens=False)
            assert UNKNOWN not in ids

    def test_the_most_frequent_answer_is_not_worth_much(self) -> None:
        random, some = Random(0), [sample_detailed_scene("train", number, photos=False) for number in range(400)]
        for kind, most in (("letter", 0.2), ("pattern", 0.35), ("marked", 0.1)):
            asked = [ask_detail(scene, random, kind) for scene in some]
            answers = Counter(question.answer for question in asked if question is not None)
            assert answers.total() > 200
            assert answers.most_common(1)[0][1] / answers.total() < most, (kind, answers)
