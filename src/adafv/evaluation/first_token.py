"""Answers read off the logits of the first answer token: one forward pass, and how likely what is right is.

With choices ("Yes", "No") the answer is the likeliest of them, whatever else the model would have said; so a small model
that rambles is still asked whether it knows. Without, it is the likeliest token of the whole vocabulary: for models whose
answers are one token, as in the drawn world.
"""

from collections.abc import Sequence
from typing import Any

import torch

from adafv.asking.session import Session
from adafv.engines.transformers import Pruner, Record
from adafv.errors import OptionError
from adafv.evaluation.answers import Asker
from adafv.evaluation.matching import score
from adafv.evaluation.questions import Question, letter_of
from adafv.evaluation.store import Chances
from adafv.printable import shortened

_DIGITS = 5
"""Of a probability that is written down."""


class FirstTokenAsker(Asker):
    """A model of whose answers the first token is read.

    Args:
        session: the model.
        choices: the answers to choose from; of questions that bring choices, their letters. None: any token.
        options: as for `Asker`.

    Raises:
        OptionError: two choices begin with the same token.
    """

    generates = False

    def __init__(self, session: Session, *, choices: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(session, max_new_tokens=1, **options)
        self.choices = None if choices is None else tuple(choices)
        if self.choices is not None:
            self._tokens(self.choices)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"first_token_of": list(self.choices) if self.choices else "the vocabulary"}

    def _said(
        self, inputs: Any, pruner: Pruner, questions: Sequence[Question]
    ) -> tuple[list[tuple[str, Chances]], Record]:
        with torch.no_grad(), pruner(self.session.model) as pruned:
            logits = self.session.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return [self._read(row, question) for row, question in zip(logits, questions, strict=True)], pruned.last

    def _read(self, logits: torch.Tensor, question: Question) -> tuple[str, Chances]:
        choices = self.choices
        if choices is not None and question.choices:
            choices = tuple(letter_of(place) for place in range(len(question.choices)))
        if choices is not None:
            among = logits[self._tokens(choices)].softmax(-1)
            listed = zip(choices, among.tolist(), strict=True)
            return choices[int(among.argmax())], tuple((name, round(chance, _DIGITS)) for name, chance in listed)
        chances = logits.softmax(-1)
        right = tuple(dict.fromkeys(question.answers or ()))
        found = tuple((answer, round(float(chances[self._first(answer)]), _DIGITS)) for answer in right)
        return str(self.session.processor.decode([int(logits.argmax())])).strip(), found

    def _tokens(self, choices: Sequence[str]) -> list[int]:
        tokens = [self._first(choice) for choice in choices]
        if len(set(tokens)) < len(tokens):
            raise OptionError(
                f"two of the choices {shortened(', '.join(choices))} begin with the same token of this model, so that its "
                "first token does not tell them apart; give others"
            )
        return tokens

    def _first(self, answer: str) -> int:
        return int(self.session.processor.tokenizer.encode(answer, add_special_tokens=False)[0])


def one_token_each(session: Session, answers: Sequence[str]) -> bool:
    """Whether the first token of each answer says all of it."""
    encode = session.processor.tokenizer.encode
    return all(len(encode(answer, add_special_tokens=False)) == 1 for answer in set(answers))


def chance_of_right(chances: Chances, question: Question, rule: str) -> float | None:
    """How likely the model finds what is right; None where that was not written down."""
    known = [chance for answer, chance in chances if score(answer, question, rule) == 1.0]
    return min(1.0, sum(known)) if known else None
