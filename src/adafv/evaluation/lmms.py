"""adafv as a model of lmms-eval: `--model adafv`. Imported by lmms-eval alone, through `registration.py`.

lmms-eval asks a model in one of two ways. A *chat* model is given messages with pictures in their places, and is asked to
generate, nothing else (lmms-eval asserts it). A *simple* model is given a text and pictures, for generation and for
likelihoods; `--force_simple` chooses it. Both are here, on the same code; `adafv eval` takes the one that a task needs.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from PIL.Image import Image
from tqdm import tqdm

from adafv.asking.failures import UsageError
from adafv.errors import OptionError, UnsupportedCallError
from adafv.evaluation.batched import BatchedModel, Chat
from adafv.images import load_image

MAX_NEW_TOKENS = 1024
"""Where a task does not say; as lmms-eval's own models."""
PLACEHOLDER = "<image>"
"""What tasks write where a picture belongs, whatever the model's own token is."""
NOT_A_STOP = "\n\n"
"""lmms-eval writes this into `until` of every task that names no stops. Answers in paragraphs would end after the first, so
its own models leave it out, and so does this one."""

_SAMPLING = ("temperature", "top_p", "top_k")
_OF_GENERATE = frozenset(
    (
        *_SAMPLING,
        *("max_new_tokens", "min_new_tokens", "do_sample", "num_beams", "repetition_penalty", "no_repeat_ngram_size"),
        *("length_penalty", "early_stopping", "use_cache"),
    )
)
_OF_OTHERS = frozenset(("until", "image_aspect_ratio"))
"""The first is read apart; the second says how LLaVA's own code prepares pictures, and stands in tasks for all models."""


class _AdaFV(lmms):
    """What both ways of asking share.

    `lmms-eval --model adafv --model_args pretrained=llava-hf/llava-1.5-7b-hf,keep=64,method=adafv,objective=split`; see
    `BatchedModel.load` for the arguments.
    """

    def __init__(self, pretrained: str = "", keep: Any = None, max_batch_size: Any = None, **arguments: Any) -> None:
        super().__init__()
        if not pretrained or keep is None:
            raise UsageError(
                "adafv needs a model and a budget: --model_args pretrained=llava-hf/llava-1.5-7b-hf,keep=64 (keep=all: none "
                "is pruned)"
            )
        self._model: BatchedModel | None = BatchedModel.load(pretrained, keep, **arguments)
        self._device = self._model.session.device
        self._stays = False

    @classmethod
    def around(cls, model: BatchedModel) -> "_AdaFV":
        """The same around a model that is loaded, and stays so when lmms-eval has done with it."""
        made = cls.__new__(cls)
        lmms.__init__(made)
        made._model, made._device, made._stays = model, model.session.device, True
        return made

    @property
    def model(self) -> BatchedModel:
        if self._model is None:
            raise UnsupportedCallError("lmms-eval has cleaned this model up; make another one")
        return self._model

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers what several processes found."""
        return self._device

    @property
    def batch_size(self) -> int:
        return self.model.batch_size

    def clean(self) -> None:
        if not self._stays:
            self._model = None
        super().clean()

    _settings_place: int
    """Where among a request's arguments the settings of generation stand."""

    def _chat(self, request: Instance) -> Chat:
        raise NotImplementedError

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        results: dict[int, GenerationResult] = {}
        start = time.perf_counter()
        with tqdm(total=len(requests), disable=self.rank != 0, desc="adafv") as progress:
            for settings, numbers in _by_settings([request.args for request in requests], self._settings_place):
                options, until = _generation(settings)
                chats = (self._chat(requests[number]) for number in numbers)
                for place, written in self.model.answers(chats, until, **options):
                    counts = TokenCounts(output_tokens=written.tokens)
                    results[numbers[place]] = GenerationResult(written.text, counts)
                    progress.update()
        seconds = time.perf_counter() - start
        tokens = sum(result.token_counts.output_tokens for result in results.values())
        tally = self.model.tally
        log_metrics(
            total_gen_tokens=tokens,
            total_elapsed_time=seconds,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={"rank": self.rank, "visual_tokens": tally.before, "visual_tokens_kept": tally.after},
        )
        return [results[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UnsupportedCallError(
            "adafv answers tasks of one round; this task's output type is generate_until_multi_round"
        )


class AdaFVChat(_AdaFV):
    """Messages with pictures in their places; generation alone."""

    is_simple = False
    _settings_place = 2

    def _chat(self, request: Instance) -> Chat:
        _, to_messages, _, number, task, split = request.args
        name = _name(task, number)
        given = ChatMessages(messages=to_messages(self._document(task, split, number)))
        images, videos, audios = given.extract_media()
        if videos or audios:
            raise UnsupportedCallError(f"{name} shows a video or plays a sound; adafv is asked about pictures here")
        messages = [{"role": message.role, "content": _parts(message.content)} for message in given.messages]
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        if images and sum(text.count(PLACEHOLDER) for text in texts) == len(images):
            for message in messages:  # pictures stand in front, and a text says where they belong
                words = [part["text"] for part in message["content"] if part["type"] == "text"]
                message["content"] = [part for text in words for part in _placed(text)]
        return Chat(messages, [_picture(image, name) for image in images], name)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        raise UnsupportedCallError(
            "lmms-eval asks for likelihoods with --force_simple alone; add it, or use adafv eval"
        )


class AdaFVSimple(_AdaFV):
    """A text and pictures; generation and likelihoods."""

    is_simple = True
    _settings_place = 1

    def _chat(self, request: Instance) -> Chat:
        context, _, to_visuals, number, task, split = request.args
        name = _name(task, number)
        visuals = to_visuals(self._document(task, split, number)) if callable(to_visuals) else to_visuals
        images = [_picture(visual, name) for visual in visuals or []]
        if images and context.count(PLACEHOLDER) == len(images):
            return Chat([{"role": "user", "content": _placed(context)}], images, name)
        return Chat.of(context, images, name)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(mean negative log-probability per token, whether greedy decoding would write it) of every answer.

        lmms-eval's interface says log-probability, but its own models return their loss, and its multiple choice takes the
        smallest: so this is the loss. What is kept of a picture depends on the question alone, not on the answer. Each stands
        in a `GenerationResult`, as lmms-eval 0.7.3 makes a string of any pair that it is given as it is, and then fails.
        """
        results: dict[int, GenerationResult] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, request in enumerate(requests):
            if len(request.args) != 6:
                raise UnsupportedCallError("adafv does not weigh answers without a question (metric acc_mutual_info)")
            context, _, _, number, task, split = request.args
            groups.setdefault((task, split, number, context), []).append(place)
        asked = list(groups.values())
        with tqdm(total=len(requests), disable=self.rank != 0, desc="adafv") as progress:
            for group, likelihoods in self.model.likelihoods(self._weighed(requests, asked)):
                for place, likelihood in zip(asked[group], likelihoods, strict=True):
                    results[place] = GenerationResult((-likelihood.mean, likelihood.greedy))
                progress.update(len(likelihoods))
        return [results[place] for place in range(len(requests))]

    def _weighed(self, requests: list[Instance], asked: list[list[int]]) -> Iterator[tuple[Chat, list[str]]]:
        for places in asked:
            _, _, _, number, task, split = requests[places[0]].args
            targets = [requests[place].args[1] for place in places]
            document = self._document(task, split, number) if any(map(callable, targets)) else None
            answers = [str(target(document)) if callable(target) else target for target in targets]
            yield self._chat(requests[places[0]]), answers


def _name(task: str, number: int) -> str:
    return f"task {task}, document {number}"


def _picture(visual: Any, name: str) -> Image:
    if isinstance(visual, Image):
        return visual
    if isinstance(visual, str) and os.path.splitext(visual)[1].lower() in (
        ".jpg",
        ".jpeg",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
    ):
        return load_image(visual)
    raise UnsupportedCallError(f"{name} shows a {type(visual).__name__}; adafv is asked about pictures here")


def _parts(content: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": part.text} if part.type == "text" else {"type": "image"} for part in content]


def _placed(text: str) -> list[dict[str, Any]]:
    """A text with its placeholders, as parts."""
    first, *others = text.split(PLACEHOLDER)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
    for other in others:
        parts.append({"type": "image"})
        if other:
            parts.append({"type": "text", "text": other})
    return parts


def _by_settings(arguments: Sequence[tuple[Any, ...]], place: int) -> list[tuple[dict[str, Any], list[int]]]:
    """(settings, numbers of the requests that have them)."""
    found: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for number, each in enumerate(arguments):
        settings = dict(each[place] or {})
        found.setdefault(json.dumps(settings, sort_keys=True, default=str), (settings, []))[1].append(number)
    return list(found.values())


def _generation(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(options of `generate`, where an answer ends) of a task's generation_kwargs.

    Raises:
        OptionError: one is not known: what it would change is not known, either.
    """
    unknown = sorted(settings.keys() - _OF_GENERATE - _OF_OTHERS)
    if unknown:
        raise OptionError(
            f"the task's generation_kwargs hold {', '.join(unknown)}, which adafv does not know; it knows "
            f"{', '.join(sorted(_OF_GENERATE))} and until"
        )
    until = settings.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop and stop != NOT_A_STOP]
    options = {name: value for name, value in settings.items() if name in _OF_GENERATE and value is not None}
    options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    # A task that says both, temperature 0.2 and no sampling, is taken at its word.
    options.setdefault("do_sample", options.get("temperature", 0) > 0)
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in _SAMPLING}
    return options, stops
