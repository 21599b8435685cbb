"""Asks a model: the same questions unpruned, with the picture blanked, and by every method at every budget.

Why it looks like this. The vision tower is the dear part that all ways have in common, so a picture goes through it once, for
all questions, methods and budgets on it; a picture with many questions stays encoded until the last of them. The unpruned
model reads the encoded pictures too: with nothing to drop, what the wrapper hands on is what the stock model makes. Methods
that need more than that (another resolution, a token twice) run on the pixels. One batch is all that is ever held.

Batches are cut from the questions in their order, whatever was answered before, so an answer does not depend on when a run
was killed: in a batch of other questions, rounding may differ.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from adafv.asking.failures import UsageError
from adafv.asking.session import Session
from adafv.core import Budget
from adafv.core.crops import Crops
from adafv.core.encoded import EncodedImage
from adafv.engines.transformers import EncodedImages, Pruner, Record, encode
from adafv.engines.transformers.encoded import ENCODED
from adafv.engines.transformers.families import family_of, found_families
from adafv.engines.transformers.settings import POSITIONS
from adafv.errors import ImageError, OptionError
from adafv.evaluation.questions import REFUSE, BadRecord, Question, Questions, refusal
from adafv.evaluation.store import Chances, Given, Store, Way, key_of
from adafv.extras import release
from adafv.images import check_shape
from adafv.methods import Method
from adafv.methods.base import LAYERS, origin_of
from adafv.methods.options import method_from_text
from adafv.printable import shortened
from adafv.prompts.text import SCOPES

UNPRUNED, BLANK = "unpruned", "blank"
"""Ways to answer that are no methods: the model as it is, and with every picture of its mean colour."""
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Configuration:
    """One way to answer."""

    name: str
    """`UNPRUNED`, `BLANK`, or the method with its options in one word."""
    budget: Budget
    method: Method | None = None
    pruning: tuple[tuple[str, str], ...] = ()
    """(option, value) of `Pruner` for this way alone: of "text", "positions" and "crops"."""

    @property
    def way(self) -> Way:
        """What it is told from others by."""
        return self.name, self.budget.key

    @cached_property
    def stored(self) -> Way:
        """What the store calls it: of another distribution's method, its release too, as the next may answer otherwise."""
        origin = "" if self.method is None else origin_of(self.method)
        return f"{self.name} of {origin}" if origin else self.name, self.budget.key

    @property
    def pruned(self) -> bool:
        return self.method is not None

    def __str__(self) -> str:
        return f"{self.name} at {self.budget}" if self.pruned else self.name


def configurations(
    methods: Sequence[str], budgets: Sequence[Budget | int | float | str], *, blank: bool = True
) -> list[Configuration]:
    """The unpruned model, the blanked picture, and every method at every budget.

    Args:
        methods: in one word each, "adafv" or "adafv:objective=split". Beside the method's own options, `text`, `positions`
            and `crops` of `Pruner` are known: "adafv:text=turn".

    Raises:
        OptionError: there is no such method, or option.
        BudgetError: one is no budget.
    """
    everything = Budget(1.0)
    made = [Configuration(UNPRUNED, everything), *([Configuration(BLANK, everything)] if blank else [])]
    for word in methods:
        method, name, pruning = _read_way(word)
        for budget in budgets:
            each = Configuration(name, Budget.of(budget), method, pruning)
            if each not in made:
                made.append(each)
    return made


def _read_way(word: str) -> tuple[Method, str, tuple[tuple[str, str], ...]]:
    """The method, its name, and the options of `Pruner` that were given with it."""
    name, *options = word.split(":")
    own, pruning = [], {}
    for option in options:
        key, _, value = (part.strip() for part in option.partition("="))
        known = {"text": SCOPES, "positions": POSITIONS}.get(key)
        if key == "crops":
            pruning[key] = str(Crops.of(value))
        elif known is None:
            own.append(option)
        elif value not in known:
            raise OptionError(f"{key}={shortened(value, 60)}; known are: {', '.join(known)}")
        else:
            pruning[key] = value
    method, called = method_from_text(":".join([name, *own]))
    listed = tuple(pruning.items())
    return method, ":".join([called, *(f"{key}={value}" for key, value in listed)]), listed


@dataclass(frozen=True)
class Progress:
    """How far a run is; an answer is one question in one way."""

    done: int
    """Answers, with those that were there before."""
    total: int
    asked: int
    """Answers of this run."""


class Asker:
    """A model that is asked in batches.

    Args:
        session: the model.
        max_new_tokens: of an answer, which is decoded greedily.
        suffix: put behind every question, such as " Answer with yes or no."
        scope: which text counts; see `adafv.prompts.text`. None: as for `Session.pruner`.
        options: of `Pruner`.
    """

    generates = True
    """Whether answers are generated, or read off the logits of one pass."""

    def __init__(
        self,
        session: Session,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        suffix: str = "",
        scope: str | None = None,
        **options: Any,
    ) -> None:
        self.session, self.suffix, self.max_new_tokens = session, suffix, max_new_tokens
        self._scope, self._options = scope, options
        self._pruners: dict[Way, Pruner] = {}
        self._held: dict[str, EncodedImage] = {}
        """Encoded pictures by digest, those of the present batch."""
        self._template: EncodedImages | None = None
        self.encoded = 0
        """Pictures that went through the tower to be kept."""

    def fingerprint(self) -> dict[str, Any]:
        """Who answers, for a `Store`: what an answer depends on beside the question and the way."""
        settings = {"suffix": self.suffix, "scope": self._scope, **self._options, "prompt": self.session.prompt("x")}
        family = family_of(self.session.model).name
        home = found_families().homes.get(family, "")
        elsewhere = {} if home.startswith("adafv.") else {f"family {family}": home}  # with its release
        return {
            "model": weights_hash(self.session.model),
            "precision": self.session.dtype,
            "prompt": _short_hash(settings),
            "picture_settings": _short_hash(json.loads(self.session.processor.image_processor.to_json_string())),
            "longest_answer": self.max_new_tokens,
            "versions": {name: release(name) for name in ("adafv", "torch", "transformers")} | elsewhere,
        }

    def check_ways(self, ways: Sequence[Configuration]) -> None:
        """Make the pruners of these ways.

        Raises:
            OptionError, UnsupportedModelError: one does not go with this model.
        """
        for way in ways:
            self._pruner(way)

    def check(self, questions: Questions, policy: str) -> Questions:
        """The questions that this model can be asked.

        Raises:
            QuestionsError: some cannot, and the policy is to refuse them.
        """
        bad = {}
        for question in questions.questions:
            try:
                self.session.check_question(question.asked + self.suffix)
            except UsageError as error:
                bad[question.name] = BadRecord(question.where or question.name, str(error))
        if bad and policy == REFUSE:
            raise refusal(list(bad.values()))
        return questions.without(list(bad.values()), set(bad))

    def run(
        self,
        questions: Questions,
        ways: Sequence[Configuration],
        store: Store,
        *,
        batch: int = 8,
        policy: str = REFUSE,
        progress: Callable[[Progress], None] = lambda progress: None,
        first: Callable[[Sequence[tuple[Question, str]]], None] = lambda asked: None,
    ) -> tuple[Questions, dict[str, str]]:
        """Ask what the store lacks.

        Args:
            policy: what becomes of a picture that turns out to be broken; `adafv.evaluation.questions.BAD_RECORDS`.
            progress: called after every batch and way.
            first: called once with the first batch that was answered, (question, key) each.

        Returns:
            The questions that were answered, without those whose pictures are broken; and their keys in the store, by name.

        Raises:
            QuestionsError: a picture is broken, and the policy is to refuse it.
            StoreError: the disk is full.
        """
        digests, bad = {}, {}
        for question in questions.questions:
            try:
                digests[question.name] = question.picture.digest()
            except ImageError as error:
                bad[question.name] = BadRecord(question.where or question.name, str(error))
        questions = _without(questions, bad, policy)
        # One picture may be there under several names.
        grouped = [replace(each, group=each.group or digests[each.name]) for each in questions.questions]
        questions = replace(questions, questions=grouped)
        keys = {each.name: key_of(each, digests[each.name]) for each in questions.questions}
        total = len(keys) * len(ways)
        done = sum(store.get(key, way.stored) is not None for key in keys.values() for way in ways)
        asked, told = 0, False
        progress(Progress(done, total, asked))
        batches = list(_batches(questions.questions, digests, batch))
        for number, these in enumerate(batches):
            lacking = [
                (way, missing)
                for way in ways
                if (missing := [each for each in these if store.get(keys[each.name], way.stored) is None])
            ]
            if lacking:
                pictures, broken = self._loaded(these, digests)
                bad = {
                    each.name: BadRecord(each.where or each.name, broken[digests[each.name]])
                    for each in these
                    if digests[each.name] in broken
                }
                if bad:
                    questions = _without(questions, bad, policy)
                    these = [each for each in these if each.name not in bad]
                    total -= len(bad) * len(ways)
                    gone = [keys.pop(name) for name in bad]
                    done -= sum(store.get(key, way.stored) is not None for key in gone for way in ways)
                for way, missing in lacking:
                    missing = [each for each in missing if each.name not in bad]
                    if missing:
                        asks = [(each, digests[each.name]) for each in missing]
                        others = [other for other, _ in lacking]
                        # What acts inside the language model takes one prompt at a time.
                        size = 1 if way.method is not None and LAYERS in way.method.stages else len(asks)
                        parts = [asks[start : start + size] for start in range(0, len(asks), size)]
                        given = [answer for part in parts for answer in self._answers(part, pictures, way, others)]
                        store.add(
                            way.stored, [(keys[e.name], *answer) for e, answer in zip(missing, given, strict=True)]
                        )
                        asked, done = asked + len(missing), done + len(missing)
                        progress(Progress(done, total, asked))
            soon = {digests[each.name] for each in batches[number + 1]} if number + 1 < len(batches) else set()
            self._forget_but(soon)
            if these and not told:
                first([(each, keys[each.name]) for each in these])
                told = True
        self._forget_but(set())
        return questions, keys

    def record(self, question: Question, way: Configuration) -> tuple[Record, Any]:
        """What is kept for a question, and the picture as the tower saw it ([C, 3, H, W] in 0..255); no answer is decoded."""
        inputs = self.session.inputs(question.picture.load(), question.asked + self.suffix)
        pruner = self._pruner(way)
        with torch.no_grad(), pruner(self.session.model) as pruned:
            if (
                self.generates and pruner.settings.crops.certain is not None
            ):  # which goes by the first token of an answer
                self.session.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            else:
                self.session.model(**inputs, logits_to_keep=1)
        return pruned.last, self.session.tower_view(inputs)

    def _loaded(
        self, questions: Sequence[Question], digests: dict[str, str]
    ) -> tuple[dict[str, Image.Image], dict[str, str]]:
        """The pictures of a batch by digest, and what is wrong with those that are broken."""
        pictures: dict[str, Image.Image] = {}
        broken: dict[str, str] = {}
        for question in questions:
            digest = digests[question.name]
            if digest not in pictures and digest not in broken:
                try:
                    pictures[digest] = question.picture.load()
                    check_shape(pictures[digest].size, question.picture.name, self.session.processor.image_processor)
                except ImageError as error:
                    broken[digest] = str(error)
                    pictures.pop(digest, None)
        return pictures, broken

    def _pruner(self, way: Configuration) -> Pruner:
        if way.way not in self._pruners:
            method = "saliency" if way.method is None else way.method  # keeps everything, so any will do
            options = {"scope": self._scope, **self._options, **dict(way.pruning)}
            options["scope"] = options.pop("text", options["scope"])
            self._pruners[way.way] = self.session.pruner(method, way.budget, **options)
        return self._pruners[way.way]

    def _answers(
        self,
        asked: Sequence[tuple[Question, str]],
        pictures: dict[str, Image.Image],
        way: Configuration,
        ways: Sequence[Configuration],
    ) -> list[tuple[Given, list[int] | None]]:
        """Answers to questions in one batch, each with the digest of its picture."""
        names = [digest for _, digest in asked]
        if way.name == BLANK:
            blanks = {digest: self._blanked(picture) for digest, picture in pictures.items()}
            names = [f"blank {blanks[digest].size}" for digest in names]
            pictures = {f"blank {blank.size}": blank for blank in blanks.values()}
        inputs = self._inputs(tuple(names), tuple(question.asked + self.suffix for question, _ in asked), pictures)
        pruner = self._pruner(way)
        encoded = self._encoded(names, inputs, pictures, ways)
        if encoded.serves(pruner.settings.method):
            taken = encoded.pixels
            inputs = {**{name: value for name, value in inputs.items() if name not in taken}, ENCODED: encoded}
        answers, record = self._said(inputs, pruner, [question for question, _ in asked])
        found = []
        for number, (answer, chances) in enumerate(answers):
            image = record.images[number]
            assert image.prompt == number, "one picture a question"
            other = image.method if way.method is not None and image.method != way.method.name else ""
            kept = image.kept.tolist() if image.tokens_after < image.tokens_before else None
            found.append((Given(answer, image.tokens_before, image.tokens_after, other, chances), kept))
        return found

    def _said(
        self, inputs: Any, pruner: Pruner, questions: Sequence[Question]
    ) -> tuple[list[tuple[str, Chances]], Record]:
        """Answers to a batch, each with how likely the model finds some of them; and what was pruned."""
        answers, record = self.session.answers(inputs, pruner, self.max_new_tokens)
        return [(answer, ()) for answer in answers], record

    _latest: tuple[Any, Any] = ((), None)

    def _inputs(self, names: tuple[str, ...], texts: tuple[str, ...], pictures: dict[str, Image.Image]) -> Any:
        """What the processor makes of a batch; the last one is kept, as all ways but one are asked the same."""
        if self._latest[0] != (names, texts):
            self._latest = (names, texts), dict(self.session.batch([pictures[name] for name in names], texts))
        return self._latest[1]

    def _encoded(
        self, names: Sequence[str], inputs: Any, pictures: dict[str, Image.Image], ways: Sequence[Configuration]
    ) -> EncodedImages:
        """The pictures of a batch, as the tower leaves them; those that are not held yet go through it."""
        new = [name for name in dict.fromkeys(names) if name not in self._held]
        model = self.session.model
        if new:
            methods: list[str | Method] = ["adafv", *(way.method for way in ways if way.method is not None)]
            some = (
                inputs if list(names) == new else self.session.batch([pictures[name] for name in new], ["x"] * len(new))
            )
            made = encode(model, some, method=methods)
            self._template = made
            self.encoded += len(new)
            self._held.update(zip(new, made.images["image"], strict=True))
        assert self._template is not None
        return self._template.showing(model, inputs, [self._held[name] for name in names])

    def _forget_but(self, soon: set[str]) -> None:
        """Hold what the next batch shows, and the blanked pictures: few, as they differ in size alone."""
        blanks = [name for name in self._held if name.startswith("blank ")][-4:]
        self._held = {name: image for name, image in self._held.items() if name in soon or name in blanks}
        self._latest = (), None

    def _blanked(self, picture: Image.Image) -> Image.Image:
        mean = getattr(self.session.processor.image_processor, "image_mean", None) or [0.5, 0.5, 0.5]
        return Image.new("RGB", picture.size, tuple(round(255 * part) for part in mean[:3]))


def refuse_idle_budgets(
    asked: Sequence[tuple[Question, str]], ways: Sequence[Configuration], store: Store, name: str
) -> None:
    """Refuse a budget that no picture of the first batch reaches; for `first` of `Asker.run`.

    Args:
        asked: (question, key) of that batch.
        name: of budgets, for the message.

    Raises:
        UsageError: there is one.
    """
    for way in ways:
        given = [store.get(key, way.stored) for _, key in asked]
        if way.pruned and all(each is not None and each.kept >= each.tokens for each in given):
            most = max(each.tokens for each in given if each is not None)
            raise UsageError(
                f"{name} {way.budget} prunes nothing: the first {len(asked)} pictures have at most {most} visual tokens; "
                "give fewer, or a share such as 25%"
            )


def weights_hash(model: Any) -> str:
    """A hash of the model's class, configuration and weights: of every tensor its shape and up to 64 values from all over it.

    The same on every device. Two models that differ in other values alone have the same; fine-tuning changes all of them.
    """
    digest = hashlib.sha256()
    config = _without_names(model.config.to_dict())
    digest.update(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name in sorted(tensors):
            tensor = tensors[name].detach()
            digest.update(repr((name, tuple(tensor.shape))).encode())
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.numel() and not tensor.is_meta:
                flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
                some = flat[:: max(1, flat.numel() // 64)][:64].cpu().contiguous()
                digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def _without_names(config: Any) -> Any:
    """A configuration without where it was loaded from and what wrote it."""
    if not isinstance(config, dict):
        return config
    return {
        name: _without_names(value)
        for name, value in config.items()
        if not str(name).startswith(("_", "transformers_version"))
    }


def _without(questions: Questions, bad: dict[str, BadRecord], policy: str) -> Questions:
    if bad and policy == REFUSE:
        raise refusal(list(bad.values()))
    left = questions.without(list(bad.values()), set(bad))
    return left.checked(policy) if bad else left


def _batches(questions: Sequence[Question], digests: dict[str, str], size: int) -> Iterator[list[Question]]:
    """Questions on one picture beside each other, pictures in the order in which they are first asked about."""
    by_picture: dict[str, list[Question]] = {}
    for question in questions:
        by_picture.setdefault(digests[question.name], []).append(question)
    ordered = [question for group in by_picture.values() for question in group]
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]
