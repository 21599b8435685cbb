"""Many chats, asked in batches: answers, and how likely given answers are.

What a benchmark asks. Prompts of one shape of pictures stand in one batch, padded in front, as `generate` wants them; texts
without a picture stand in batches of their own, and go to the stock model as they are.
"""

import os
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from adafv.asking.failures import UsageError, check_text
from adafv.asking.models import checked_model
from adafv.asking.padding import Prompt, filling_of, in_one_batch, longest, until_the_end
from adafv.asking.session import Session, check_device
from adafv.core import Budget
from adafv.engines.transformers import Pruner
from adafv.engines.transformers.families.base import family_of
from adafv.errors import AdaFVError, NoRecordError, OptionError, UnsupportedCallError
from adafv.images import check_shape
from adafv.methods.options import method_from_options
from adafv.prompts.text import image_text


@dataclass(frozen=True)
class Chat:
    """What a model is to answer."""

    messages: Sequence[Mapping[str, Any]]
    """Each with a role and content parts: {"type": "text", "text": ...}, or {"type": "image"} for the next picture."""
    images: Sequence[Image] = ()
    """Their pictures, in order."""
    name: str = ""
    """What messages call it."""

    @classmethod
    def of(cls, question: str, images: Sequence[Image] = (), name: str = "") -> "Chat":
        """One question of the user, behind its pictures."""
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        return cls([{"role": "user", "content": parts}], images, name)


@dataclass(frozen=True)
class Written:
    """What was answered."""

    text: str
    tokens: int
    """That were generated, the one that ends the answer included."""


@dataclass(frozen=True)
class Likelihood:
    """How likely a given answer is."""

    total: float
    """Log-probability of all its tokens, natural."""
    tokens: int
    greedy: bool
    """Whether greedy decoding would write just this."""

    @property
    def mean(self) -> float:
        """Log-probability per token."""
        return self.total / self.tokens


@dataclass
class Tally:
    """What was asked so far."""

    images: int = 0
    """Pictures shown, however often the same one."""
    before: int = 0
    """Their visual tokens."""
    after: int = 0
    """... that stayed."""


@dataclass
class BatchedModel:
    """A model, how it is pruned, and how many prompts it reads at once."""

    session: Session
    pruner: Pruner | None
    """None: the stock model as it is."""
    batch_size: int = 1
    tally: Tally = field(default_factory=Tally)

    @classmethod
    def load(
        cls,
        pretrained: str,
        keep: Budget | int | float | str,
        method: str = "adafv",
        text: str | None = None,
        positions: str = "compact",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> "BatchedModel":
        """A model from a folder or the Hub, as people write what they want.

        Args:
            pretrained: folder of a checkpoint, its id on the Hugging Face Hub, or bundled.
            keep: visual tokens of every picture; all of them: the stock model, as it is.
            device: None: cuda where there is one, and the own one of several processes.
            **options: of the method.

        Raises:
            UsageError, OptionError, BudgetError, LoadError, UnsupportedModelError: as on the command line.
        """
        budget = Budget.of(keep)
        words = {name: str(value).lower() if isinstance(value, bool) else value for name, value in options.items()}
        chosen = method_from_options(method, [f"{name}={value}" for name, value in words.items()])
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise OptionError(f"batch_size={batch_size!r}: adafv takes a number, such as 8")
        if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        session = Session.load(checked_model(pretrained), dtype, check_device(device))
        pruner = None if budget.keeps_all else session.pruner(chosen, budget, text, positions=positions)
        return cls(session, pruner, int(batch_size))

    def prompt(self, chat: Chat) -> Prompt:
        """A chat as the model takes it.

        Raises:
            UsageError: a text of it is none, or holds what stands for a picture.
            ImageError: a picture is too large, or too long for its width.
            UnsupportedCallError: the model's processor gives what cannot be put in a batch.
        """
        try:
            return self._prompt(chat)
        except (AdaFVError, UsageError) as error:
            if not chat.name:
                raise
            raise type(error)(f"{chat.name}: {error}") from error

    def _prompt(self, chat: Chat) -> Prompt:
        processor = self.session.processor
        placeholder = image_text(processor)
        for part in (part for message in chat.messages for part in message["content"] if part["type"] == "text"):
            check_text(part["text"], "the question")
            if placeholder in part["text"]:
                raise UsageError(f"the question holds {placeholder}, which stands for a picture; leave it out")
        for image in chat.images:
            check_shape(image.size, "the picture", processor.image_processor)
        text = self._written(chat, placeholder)
        start = processor.tokenizer.bos_token
        # As transformers does: a template that writes the first token itself must not get a second one.
        own = bool(start) and text.startswith(start)
        pictures = {"images": [image.convert("RGB") for image in chat.images]} if chat.images else {}
        inputs = dict(processor(**pictures, text=text, return_tensors="pt", add_special_tokens=not own))
        for name, value in inputs.items():
            if not isinstance(value, Tensor):
                raise UnsupportedCallError(
                    f"this model's processor gives {name} as a {type(value).__name__}, which cannot be put in a batch; ask "
                    "the model itself, with AdaFV(...)(model)"
                )
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return Prompt(inputs, text)

    def _written(self, chat: Chat, placeholder: str) -> str:
        processor = self.session.processor
        if getattr(processor, "chat_template", None) is not None:
            return str(
                processor.apply_chat_template([dict(each) for each in chat.messages], add_generation_prompt=True)
            )
        if len(chat.messages) != 1 or chat.messages[0]["role"] != "user":
            raise UsageError(
                "this model has no chat template, so it takes one question of the user and no other message"
            )
        words = "".join(part["text"] for part in chat.messages[0]["content"] if part["type"] == "text")
        form = family_of(self.session.model).prompt
        return form.format(image=placeholder * len(chat.images), question=words)

    def answers(
        self, chats: Iterable[Chat], until: Sequence[str] = (), **options: Any
    ) -> Iterator[tuple[int, Written]]:
        """(number of the chat, answer) in the order in which batches fill up; chats are read as they are needed.

        Args:
            until: an answer ends in front of the first of these.
            **options: of `generate`; greedy decoding where they say nothing else.
        """
        waiting: dict[Hashable, list[tuple[int, Prompt]]] = {}
        for number, chat in enumerate(chats):
            prompt = self.prompt(chat)
            group = waiting.setdefault(prompt.shape, [])
            group.append((number, prompt))
            if len(group) == self.batch_size:
                yield from self._answered(waiting.pop(prompt.shape), until, options)
        for group in waiting.values():
            yield from self._answered(group, until, options)

    def _answered(
        self, group: list[tuple[int, Prompt]], until: Sequence[str], options: dict[str, Any]
    ) -> Iterator[tuple[int, Written]]:
        tokenizer = self.session.processor.tokenizer
        prompts = [prompt for _, prompt in group]
        options = {"do_sample": False} | options
        if until:
            options["stopping_criteria"] = StoppingCriteriaList([_Until(tokenizer, until, longest(prompts))])
        output, read = self._generate(prompts, options)
        for (number, _), tokens in zip(group, output.sequences[:, read:].tolist(), strict=True):
            own = tokens[: until_the_end(tokens, self.session.model.generation_config.eos_token_id)]
            text = tokenizer.decode(own, skip_special_tokens=True)
            ends = [place for place in map(text.find, until) if place >= 0]
            yield number, Written(text[: min(ends, default=len(text))].strip(), len(own))

    def likelihoods(self, asked: Iterable[tuple[Chat, Sequence[str]]]) -> Iterator[tuple[int, list[Likelihood]]]:
        """(number of the chat, how likely each of the answers given with it is), in the order in which batches fill up.

        An answer is written behind the prompt as it is, with the blank in front of it if it has one, and nothing behind it.
        Where a tokenizer joins its first letters with the prompt's last, the joined token counts as the answer's. What is
        kept of a picture depends on the prompt alone, never on the answer: the model is made to write the answer behind
        the prompt, and asked at each token how likely that was. Answers of one token are read off one run.
        """
        waiting: dict[Hashable, list[_Run]] = {}
        found: dict[int, dict[int, Likelihood]] = {}
        wanted: dict[int, int] = {}
        for number, (chat, answers) in enumerate(asked):
            wanted[number] = len(answers)
            for run in self._runs(number, self.prompt(chat), answers):
                group = waiting.setdefault(run.prompt.shape, [])
                group.append(run)
                if len(group) == self.batch_size:
                    yield from self._weighed(waiting.pop(run.prompt.shape), found, wanted)
        for group in waiting.values():
            yield from self._weighed(group, found, wanted)

    def _runs(self, number: int, prompt: Prompt, answers: Sequence[str]) -> "list[_Run]":
        """What has to be run to weigh the answers to one prompt."""
        tokenizer = self.session.processor.tokenizer
        alone = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        if alone[-1] != int(prompt.inputs["input_ids"][0, -1]):
            raise UnsupportedCallError(
                "this model's processor writes something behind the prompt, so nothing can be weighed behind it; use a task "
                "whose output type is generate_until"
            )
        by_joined: dict[int, list[tuple[int, list[int]]]] = {}
        for place, answer in enumerate(answers):
            check_text(answer, "the answer")
            whole = tokenizer(prompt.text + answer, add_special_tokens=False)["input_ids"]
            same = next((i for i, (one, other) in enumerate(zip(alone, whole)) if one != other), len(alone))
            if not whole[same:]:
                raise UsageError("an answer to weigh is empty; leave it out")
            by_joined.setdefault(len(alone) - same, []).append((place, whole[same:]))
        runs = []
        for joined, each in by_joined.items():
            short = [one for one in each if len(one[1]) == 1]
            forced = [one for one in each if len(one[1]) > 1] or [short.pop()]
            first, *others = (_Run(number, prompt.cut(joined), [one]) for one in forced)
            first.answers.extend(short)
            runs += [first, *others]
        return runs

    def _weighed(
        self, group: "list[_Run]", found: dict[int, dict[int, Likelihood]], wanted: dict[int, int]
    ) -> Iterator[tuple[int, list[Likelihood]]]:
        forced = [run.answers[0][1] for run in group]
        steps = max(map(len, forced))
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": steps, "min_new_tokens": steps}
        writing = {"logits_processor": LogitsProcessorList([_Write(forced)]), "output_logits": True}
        output, _ = self._generate([run.prompt for run in group], options | writing)
        logs = torch.stack([each.float() for each in output.logits], 1).log_softmax(-1)
        for row, run in enumerate(group):
            for place, tokens in run.answers:
                own, wish = logs[row, : len(tokens)], torch.tensor(tokens, device=logs.device)
                total = own.gather(1, wish.unsqueeze(1)).sum().item()
                greedy = bool((own.argmax(-1) == wish).all())
                found.setdefault(run.number, {})[place] = Likelihood(total, len(tokens), greedy)
            if len(found[run.number]) == wanted[run.number]:
                complete = found.pop(run.number)
                yield run.number, [complete[place] for place in sorted(complete)]

    def _generate(self, prompts: list[Prompt], options: dict[str, Any]) -> tuple[Any, int]:
        """(what `generate` returns, columns of the prompt in it)."""
        model, tokenizer = self.session.model, self.session.processor.tokenizer
        filling, length = filling_of(tokenizer), longest(prompts)
        inputs = self.session.placed(in_one_batch(prompts, filling))
        options = {"pad_token_id": filling, "use_cache": True} | options | {"return_dict_in_generate": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.pruner is None:
                return model.generate(**inputs, **options), length
            with self.pruner(model) as pruned:
                output = model.generate(**inputs, **options)
        with suppress(NoRecordError):  # texts without a picture leave none
            record = pruned.last
            self.tally.images += len(record.images)
            self.tally.before += sum(record.tokens_before)
            self.tally.after += sum(record.tokens_after)
        return output, length


@dataclass
class _Run:
    """One row of a batch that weighs answers."""

    number: int
    """Of the chat."""
    prompt: Prompt
    answers: list[tuple[int, list[int]]]
    """(place, tokens) of the answer that is written, then of those of one token."""


class _Until(StoppingCriteria):
    """Ends rows in whose answers a text stands. transformers' own looks tokens up, and fails for closed vocabularies."""

    def __init__(self, tokenizer: Any, until: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._until, self._prompt = tokenizer, until, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        rows = input_ids[:, self._prompt :].tolist()
        texts = (self._tokenizer.decode(row, skip_special_tokens=True) for row in rows)
        found = [any(stop in text for stop in self._until) for text in texts]
        return torch.tensor(found, device=input_ids.device)


class _Write(LogitsProcessor):
    """Makes `generate` write given tokens, step by step; behind the end of a row's own, its last one again."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._rows = rows
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, self._step = self._step, self._step + 1
        wish = torch.tensor([row[min(step, len(row) - 1)] for row in self._rows], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, wish.unsqueeze(1), 0.0)
