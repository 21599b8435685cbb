"""Which question should choose what is kept of a picture, where a second one follows the first?

    python -m benchmarks.chat [--model bundled] [--methods facet,adafv] [--keep 7] [--pairs 70]

`docs/command-line.md` has the results. Two questions about each drawn scene, in both orders; what counts is the answer to the
second one.

- own: asked by itself, tokens chosen by its own words.
- first: asked by itself, tokens chosen by the words of the question before it.
- chat: behind the first question and its answer, tokens chosen by all that was said (`adafv ask --chat`).
- chat, first: the same, tokens chosen by the first question (`--text question`), as on a cache that is continued.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adafv.asking.session import CHAT_SCOPE, Session
from adafv.core.tokens import Kept, VisualTokens
from adafv.evaluation.drawn import drawn_questions, side_for
from adafv.evaluation.questions import Question
from adafv.evaluation.world.backgrounds import check_photographs
from adafv.methods import Method
from adafv.methods.options import method_from_text

WAYS = ("own", "first", "chat", "chat, first")
LONGEST = 3
"""Tokens of an answer."""


@dataclass(frozen=True)
class Chosen(Method):
    """What was chosen for another question."""

    places: Tensor

    name = "chosen"
    summary = "tokens that are known"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return Kept(self.places.unsqueeze(0))


def pairs_of(model: object, count: int, photos: bool) -> Iterator[tuple[Question, Question]]:
    """`count` pairs of questions about a scene, each in both orders."""
    asked = drawn_questions(4 * count, side_for(model), photos=photos)
    groups = [list(group) for _, group in itertools.groupby(asked, key=lambda question: question.group)]
    for one, other in [group for group in groups if len(group) == 2][:count]:
        yield one, other
        yield other, one


def right(session: Session, method: Method, keep: int, one: Question, two: Question) -> tuple[bool, ...]:
    """Whether the second question is answered right, in each of `WAYS`."""
    session = session.preparing_once()
    picture = one.picture.load()
    alone = session.inputs(picture, two.text)
    encoded = session.encoded(alone)
    first = session.ask(session.inputs(picture, one.text), session.pruner(method, keep), LONGEST, encoded)
    assert first.record is not None
    chat = session.inputs(picture, two.text, [(one.text, first.answer)])
    asked = [
        (alone, session.pruner(method, keep)),
        (alone, session.pruner(Chosen(first.record.kept[0]), keep)),
        (chat, session.pruner(method, keep, CHAT_SCOPE)),
        (chat, session.pruner(method, keep, "question")),
    ]
    answers = (session.ask(inputs, pruner, LONGEST, encoded).answer for inputs, pruner in asked)
    return tuple(answer.strip().lower() in (two.answers or ()) for answer in answers)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--methods", default="facet,adafv")
    parser.add_argument("--keep", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=70)
    parser.add_argument("--no-photos", action="store_true", help="no pieces of photographs behind the scenes")
    options = parser.parse_args(arguments)
    if not options.no_photos:
        check_photographs()
    torch.set_num_threads(1)
    session = Session.load(options.model, "float32", torch.device("cpu"))
    pairs = list(pairs_of(session.model, options.pairs, not options.no_photos))
    print(f"{len(pairs)} second questions, {options.keep} tokens kept; % right\n\n| method | {' | '.join(WAYS)} |")
    print("|---" * (1 + len(WAYS)) + "|")
    for named in options.methods.split(","):
        method, name = method_from_text(named)
        found = zip(*(right(session, method, options.keep, *pair) for pair in pairs), strict=True)
        shares = [f"{100 * statistics.fmean(each):.1f}" for each in found]
        print(f"| {name} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
