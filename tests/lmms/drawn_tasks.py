"""Local tasks for lmms-eval: questions about drawn scenes, saved to disk, with the YAML that makes tasks of them."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value
from PIL.Image import Image as Picture

from adafv.evaluation.world.objects import COLOURS
from adafv.evaluation.world.questions import ask
from adafv.evaluation.world.scenes import render, sample_scene

QUESTIONS = 9
SIDES = (144, 176, 120)
CHOICES = 4

_COMMON = """\
task: {name}
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
doc_to_visual: !function utils.pictures
doc_to_text: question
"""
_GENERATE = """\
doc_to_target: answer
output_type: generate_until
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: {temperature}
  do_sample: false
  until: {until}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_CHOOSE = """\
doc_to_target: right
doc_to_choice: choices
output_type: multiple_choice
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_WEIGH = """\
doc_to_target: " {{answer}}"
output_type: loglikelihood
process_results: !function utils.greedy
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_UTILS = """
def pictures(doc):
    return [picture.convert("RGB") for picture in doc["pictures"]]


def greedy(doc, results):
    [[loss, greedy]] = results
    return {"acc": float(greedy)}
"""


@dataclass(frozen=True)
class Drawn:
    """The tasks, and what is in them."""

    folder: Path
    pictures: list[list[Picture]]
    questions: list[str]
    answers: list[str]
    choices: list[list[str]]

    def one_picture(self) -> list[int]:
        """Numbers of the questions about just one picture."""
        return [number for number, pictures in enumerate(self.pictures) if len(pictures) == 1]


def draw(folder: Path) -> Drawn:
    """Write the tasks drawn_generate, drawn_until, drawn_choose, drawn_weigh, and two with settings of their own.

    Of the questions one has no picture and one has two; pictures are of three sizes.
    """
    pictures, questions, answers, choices, right = [], [], [], [], []
    for number in range(QUESTIONS):
        random = Random(number)
        scene = sample_scene("test", number, photos=False)
        question = ask(scene, random)
        assert question is not None
        shown = [render(scene, SIDES[number % len(SIDES)])[0]]
        if number == 4:
            shown = []
        if number == 7:
            shown *= 2
        others = random.sample([colour for colour in COLOURS if colour != question.answer], CHOICES - 2)
        # One of several words, so that not all choices are one token.
        listed = [question.answer, *others, f"{others[0]} {others[1]}"]
        random.shuffle(listed)
        pictures.append(shown)
        questions.append(question.text)
        answers.append(question.answer)
        choices.append(listed)
        right.append(listed.index(question.answer))
    features = Features(
        {
            "pictures": Sequence(Image()),
            "question": Value("string"),
            "answer": Value("string"),
            "choices": Sequence(Value("string")),
            "right": Value("int64"),
        }
    )
    columns = {"pictures": pictures, "question": questions, "answer": answers, "choices": choices, "right": right}
    DatasetDict({"test": Dataset.from_dict(columns, features=features)}).save_to_disk(str(folder / "data"))
    (folder / "utils.py").write_text(_UTILS)
    greedy = {"tokens": 12, "temperature": 0, "until": "[]"}
    tasks = {
        "drawn_generate": _GENERATE.format(**greedy),
        "drawn_until": _GENERATE.format(**greedy | {"until": '["e", "\\n\\n"]'}),
        "drawn_told_not_to_sample": _GENERATE.format(**greedy | {"temperature": 0.9}),
        "drawn_unknown": _GENERATE.format(**greedy).replace("do_sample", "do_the_dishes"),
        "drawn_choose": _CHOOSE,
        "drawn_weigh": _WEIGH,
    }
    for name, own in tasks.items():
        (folder / f"{name}.yaml").write_text(_COMMON.format(name=name, data=folder / "data") + own)
    return Drawn(folder, pictures, questions, answers, choices)
