"""A loaded model with its processor, for the command line: questions in, answers and measurements out.

A checkpoint is data: its weights are read as safetensors, and no code that it brings is run, whoever asks for that.
"""

import contextlib
import io
import logging
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL.Image import Image
from torch import Tensor

from adafv import defaults
from adafv.asking.failures import LoadError, UsageError, check_text
from adafv.asking.models import folder_or_id, hub_options, within
from adafv.asking.padding import Prompt, filling_of, in_one_batch, until_the_end
from adafv.asking.pictures import preparing_once
from adafv.core import Budget
from adafv.engines.transformers import EncodedImages, ImageRecord, Pruner, Record, encode
from adafv.engines.transformers.encoded import ENCODED, takes_encoded
from adafv.engines.transformers.families.base import family_of, known_families, unsupported
from adafv.engines.transformers.reading import read_prompt
from adafv.engines.transformers.releases import returned_cache
from adafv.errors import AdaFVError
from adafv.images import check_shape
from adafv.methods import Method, method_named
from adafv.methods.base import LAYERS, TOKENS
from adafv.picture import tower_view
from adafv.printable import shortened
from adafv.prompts.text import image_text

MIB = 2**20

TOGETHER, TOKENS_TOGETHER = 8, 4096
"""Questions in one batch, and visual tokens of all of them, at most."""

Turn = tuple[str, str]
"""A question and the answer that it got."""
CHAT_SCOPE = "after"
"""Which text counts in a chat where nobody says (see `adafv.prompts.text`): all that was said about the picture. So what is
kept of it is chosen anew in every turn; under the other scopes the first question alone would choose for all of them."""

SAFELY = {"trust_remote_code": False}
"""What every `from_pretrained` gets. Left out, transformers asks on standard input, and takes a "y" from a pipe."""
TEMPLATE_TIMEOUT = 20.0
"""Seconds for writing one prompt. A chat template is a program: it can do nothing but write text, but that for ever."""


@dataclass(frozen=True)
class Answer:
    """One answer and what it took."""

    answer: str
    kv_mib: float
    """Keys and values of the prompt, read from the cache."""
    record: Record | None
    note: str = ""
    """What is to be said about how it came about; mostly empty."""
    row: int = 0
    """Where it stands in the batch that the record speaks of."""
    together: int = 1
    """Questions in that batch."""

    @property
    def images(self) -> list[ImageRecord]:
        """What was done to the pictures of this very question."""
        return [] if self.record is None else [image for image in self.record.images if image.prompt == self.row]


@dataclass(frozen=True)
class Timing:
    """One way to run, measured."""

    name: str
    answer: str
    tokens: int
    seconds: list[float]
    """To the first token: tower, selection, prefill and one token; one entry per timed round."""
    kv_mib: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "answer": self.answer,
            "tokens": self.tokens,
            "seconds_to_first_token": {
                "median": self.median,
                "min": min(self.seconds),
                "max": max(self.seconds),
                "rounds": self.seconds,
            },
            "kv_mib": self.kv_mib,
        }


def check_device(name: str | None) -> torch.device:
    """The device to run on; cuda where there is one, if none was named."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, NotImplementedError, ModuleNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"--device {name!r} cannot be used here ({shortened(reason)}); try cpu") from error
    return device


@dataclass(frozen=True)
class Session:
    """A stock model and its processor. Threads may share it: they are answered one after the other.

    A model is pruned in one way at a time, so an answer beside another would be pruned as that one, or refused.
    """

    model: Any
    processor: Any
    _one_at_a_time: Any = field(default_factory=threading.RLock, repr=False, compare=False)

    @classmethod
    def load(cls, name: str, dtype: str, device: torch.device) -> "Session":
        """Load `name`, a folder, a Hub id or the name of a bundled model, quietly.

        Raises:
            LoadError: there is no such checkpoint, or it is broken.
            UnsupportedModelError: its class is not supported; found from the configuration, before any weights.
        """
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        # Or the Hub would be asked to convert, in public, weights that are no safetensors.
        os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
        source = folder_or_id(name)
        options = SAFELY | hub_options(source)
        with _unattended():
            try:
                config = transformers.AutoConfig.from_pretrained(source, **options)
                _check_architecture(config)
                _check_kernels(config, name)
                processor = transformers.AutoProcessor.from_pretrained(source, **options)
                if "local_files_only" in options:  # adapters are looked for apart, and would be on the Hub
                    options["adapter_kwargs"] = {"local_files_only": True}
                model = transformers.AutoModelForImageTextToText.from_pretrained(
                    source, dtype=dtype, use_safetensors=True, **options
                )
            except (AdaFVError, MemoryError, KeyboardInterrupt):
                raise
            except Exception as error:  # the Hub, safetensors, tokenizers and JSON raise errors of many kinds
                if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
                    raise
                raise _load_error(name, error) from error
            model = model.to(device).eval()
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise LoadError(
                f"{shortened(name)} has no image processor beside its tokenizer; use the checkpoint's original files"
            )
        family_of(model)
        session = cls(model, processor)
        _check_template(session, name)
        return session

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def preparing_once(self) -> "Session":
        """The same for a few pictures that are asked about again and again, and not changed meanwhile: each is prepared once.

        All of them are held as long as it lives.
        """
        return replace(self, processor=preparing_once(self.processor))

    def inputs(self, image: Image, question: str, before: Sequence[Turn] = ()) -> Any:
        """One image and one question, as the model takes them.

        Args:
            before: the turns of the chat in front of this question; the image stands in the first one.

        Raises:
            UsageError: the question is not text, or holds what stands for an image.
        """
        return self._read(image, question, before).to(self.device, self.model.dtype)

    def batch(self, images: Sequence[Image], questions: Sequence[str]) -> Any:
        """Questions about an image each, as one batch, padded on the left. An image that stands there twice is prepared once.

        Raises:
            UsageError, ImageError: as `inputs`.
        """
        once = self.preparing_once()
        read = [Prompt(once._read(image, question)) for image, question in zip(images, questions, strict=True)]
        return self.placed(in_one_batch(read, filling_of(self.processor.tokenizer)))

    def _read(self, image: Image, question: str, before: Sequence[Turn] = ()) -> Any:
        self.check_question(question)
        check_shape(image.size, "the image", self.processor.image_processor)
        text, start = self.prompt(question, before), self.processor.tokenizer.bos_token
        # As transformers does: a template that writes the first token itself must not get a second one.
        written = bool(start) and text.startswith(start)
        with self._one_at_a_time:  # tokenizers are not for two threads at once
            return self.processor(images=image, text=text, return_tensors="pt", add_special_tokens=not written)

    def placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs on the device of the model, pixels in its precision."""
        found = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                moved = value.to(self.device)
                found[name] = moved.to(self.model.dtype) if moved.is_floating_point() else moved
        return found

    def check_question(self, question: str) -> None:
        """Find out whether the model can be asked this.

        Raises:
            UsageError: it is not text, holds what stands for an image, or is longer than the model's context.
        """
        check_text(question, "the question")
        placeholder = image_text(self.processor)
        if placeholder in question:
            raise UsageError(f"the question holds {placeholder}, which stands for an image; leave it out")
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        # A token is at least a byte, so most questions need not be split into tokens here.
        if most is not None and len(question.encode()) >= most:
            tokens = len(self.processor.tokenizer(question, add_special_tokens=False).input_ids)
            if tokens >= most:
                raise UsageError(f"the question has {tokens} tokens, and the model has {most} positions; shorten it")

    def prompt(self, question: str, before: Sequence[Turn] = ()) -> str:
        """The text of one image and one question, behind earlier turns, as the model's chat template writes it."""
        if getattr(self.processor, "chat_template", None) is None:
            if before:
                raise UsageError(
                    "this model has no chat template, so it cannot be shown earlier questions; leave --chat out"
                )
            return family_of(self.model).prompt.format(image=image_text(self.processor), question=question)
        if any(image_text(self.processor) in text for turn in before for text in turn):
            raise UsageError(
                f"an earlier answer holds {image_text(self.processor)}, which stands for an image; begin another chat"
            )
        said: list[Any] = [
            (role, text) for turn in before for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        said.append(("user", question))
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
        chat[0]["content"].insert(0, {"type": "image"})
        return str(self.processor.apply_chat_template(chat, add_generation_prompt=True))

    def check_chat(self) -> None:
        """Find out whether the model's chat template writes earlier turns.

        Raises:
            UsageError: it does not, or there is none.
        """
        words = ("zalpha", "kiwano", "xerox")
        try:
            written = self.prompt(words[2], [words[:2]])
        except UsageError:
            raise
        except Exception as error:  # Jinja's, and whatever a template raises
            raise UsageError(
                f"this model's chat template takes one question alone ({shortened(error)}); leave --chat out"
            ) from error
        if not all(word in written for word in words):
            raise UsageError("this model's chat template leaves earlier questions or answers out; leave --chat out")

    def check_room(self, inputs: Any, pruner: Pruner, max_new_tokens: int) -> None:
        """Find out whether a chat and its next answer fit the positions that the model has.

        Raises:
            UsageError: they do not.
        """
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        settings, length = pruner.settings, int(inputs["input_ids"].shape[1])
        if settings.positions == "compact" and settings.method.stages == {TOKENS}:
            tokens = self._visual_tokens(inputs)
            length -= tokens - settings.budget.tokens(tokens)
        if most is not None and length + max_new_tokens > most:
            raise UsageError(
                f"the chat has {length} tokens, and the model has {most} positions for it and for an answer of "
                f"{max_new_tokens}; begin another one"
            )

    def pruner(
        self, method: str | Method, keep: Budget | int | float | str, scope: str | None = None, **options: Any
    ) -> Pruner:
        """A pruner for this model; `scope` is what `Pruner` calls `text`, and `options` are as it takes them."""
        return Pruner(method, keep, text=scope, processor=self.processor, **options)

    def encoded(self, inputs: Any, held: EncodedImages | None = None, methods: Sequence[Method] = ()) -> EncodedImages:
        """What tower and projector make of the picture: `held`, where that is what they made of it before.

        Args:
            methods: that will choose, beside the default and the paper's; those that need the pixels do not matter.
        """
        named = [method_named(name) for name in (defaults.PAPER, defaults.METHOD)]
        methods = [*named, *filter(takes_encoded, methods)]
        if held is not None and held.holds(self.model, inputs, *methods):
            return held
        return encode(self.model, inputs, method=methods)

    def ask(
        self, inputs: Any, pruner: Pruner | None, max_new_tokens: int, encoded: EncodedImages | None = None
    ) -> Answer:
        """Answer by greedy decoding; without a pruner, by the stock model.

        Args:
            encoded: the picture, which then does not go through the tower again, where the pruner can do with that.
        """
        if encoded is not None and pruner is not None and encoded.serves(pruner.settings.method):
            inputs = {**inputs, ENCODED: encoded}
        output, record = self._run(inputs, pruner, max_new_tokens)
        prompt = inputs["input_ids"].shape[1]
        answer = self.processor.tokenizer.decode(output.sequences[0, prompt:], skip_special_tokens=True).strip()
        cached: int | list[int] = prompt
        if record is not None:
            cached = record.layer_lengths or record.prompt_length_after
        return Answer(answer, _cache_bytes(returned_cache(output), cached) / MIB, record, _note(pruner, record, 0))

    def ask_together(self, image: Image, questions: Sequence[str], pruner: Pruner, max_new_tokens: int) -> list[Answer]:
        """Answer several questions about one picture by greedy decoding, read as one batch.

        A pruner with `remember=` sends the picture through the tower once. In float32 the answers are those that the
        questions get one by one; in lower precision another batch may round otherwise.
        """
        if len(questions) == 1:
            return [self.ask(self.inputs(image, questions[0]), pruner, max_new_tokens)]
        inputs = self.batch([image] * len(questions), questions)
        output, record = self._run(inputs, pruner, max_new_tokens)
        assert record is not None
        cache = returned_cache(output)
        own = (record.columns >= 0).sum(1).tolist()  # what fills up the shorter ones is nobody's
        return [
            Answer(
                text,
                _cache_bytes(cache, own[row], rows=1) / MIB,
                record,
                _note(pruner, record, row),
                row,
                len(questions),
            )
            for row, text in enumerate(self._texts(inputs, output))
        ]

    def most_together(self, inputs: Any, pruner: Pruner) -> int:
        """How many questions like this one `ask_together` should get: as many as a GPU of a few GiB has room for."""
        settings = pruner.settings
        if LAYERS in settings.method.stages:
            return 1  # what acts inside the language model takes one prompt at a time
        return max(1, min(TOGETHER, TOKENS_TOGETHER // settings.budget.tokens(self._visual_tokens(inputs))))

    def _visual_tokens(self, inputs: Any) -> int:
        return int((inputs["input_ids"] == family_of(self.model).placeholder(self.model, "image")).sum())

    def _texts(self, inputs: Any, output: Any) -> list[str]:
        """The answers of a batch."""
        ends = self.model.generation_config.eos_token_id
        rows = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        rows = [row[: until_the_end(row, ends)] for row in rows]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def answers(self, inputs: Any, pruner: Pruner, max_new_tokens: int) -> tuple[list[str], Record]:
        """Answer a batch (see `batch`) by greedy decoding, and what was pruned of it."""
        output, record = self._run(inputs, pruner, max_new_tokens)
        assert record is not None
        return self._texts(inputs, output), record

    def compare(
        self,
        inputs: Any,
        modes: dict[str, Pruner | None],
        max_new_tokens: int,
        repeats: int,
        known: dict[str, Answer],
    ) -> list[Timing]:
        """Run every mode, and measure the time to the first token.

        One untimed run per mode warms up; then the modes take turns, so that a busy machine is unfair to none of them.

        Args:
            known: answers that there are already.
        """
        answers = {name: known.get(name) or self.ask(inputs, pruner, max_new_tokens) for name, pruner in modes.items()}
        tokens = self._visual_tokens(inputs)
        seconds: dict[str, list[float]] = {name: [] for name in modes}
        kv_mib = {name: self.ask(inputs, pruner, 1).kv_mib for name, pruner in modes.items()}
        for _ in range(repeats):
            for name, pruner in modes.items():
                seconds[name].append(self._time_to_first_token(inputs, pruner))
        return [
            Timing(
                name,
                answer.answer,
                tokens if answer.record is None else sum(answer.record.tokens_after),
                seconds[name],
                kv_mib[name],
            )
            for name, answer in answers.items()
        ]

    def _time_to_first_token(self, inputs: Any, pruner: Pruner | None) -> float:
        self._wait()
        start = time.perf_counter()
        self._run(inputs, pruner, 1)
        self._wait()
        return time.perf_counter() - start

    def _run(self, inputs: Any, pruner: Pruner | None, max_new_tokens: int) -> tuple[Any, Record | None]:
        """What `generate` returns, and what was pruned; without a pruner, by the stock model."""
        with self._one_at_a_time:
            if pruner is None:
                return self._generate(inputs, max_new_tokens), None
            with pruner(self.model) as pruned:
                return self._generate(inputs, max_new_tokens), pruned.last

    def _generate(self, inputs: Any, max_new_tokens: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.model.generate(
                **inputs,
                do_sample=False,
                use_cache=True,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                **({} if len(inputs["input_ids"]) == 1 else {"pad_token_id": filling_of(self.processor.tokenizer)}),
            )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def tower_view(self, inputs: Any) -> Tensor:
        """The first image as the tower saw it: [C, 3, H, W] in 0..255."""
        family = family_of(self.model)
        runs = read_prompt(self.model, family, inputs).runs("image")
        visuals = {family.named(name): value for name, value in inputs.items()}
        pixels = family.view(self.model, visuals, family.layouts(self.model, "image", visuals, runs))
        settings = self.processor.image_processor
        normalized = getattr(settings, "do_normalize", True)
        mean = settings.image_mean if normalized else [0.0, 0.0, 0.0]
        std = settings.image_std if normalized else [1.0, 1.0, 1.0]
        # `tower_view` expects values that were rescaled from 0..255 to 0..1 before they were normalised.
        scale = 255.0 * settings.rescale_factor if getattr(settings, "do_rescale", True) else 255.0
        return tower_view(pixels, [value / scale for value in mean], [value / scale for value in std])


def _note(pruner: Pruner | None, record: Record | None, row: int) -> str:
    """What is to be said about how the answer in a row of the batch came about."""
    methods = [] if record is None else [image.method for image in record.images if image.prompt == row]
    if pruner is None or not methods or methods[0] == pruner.settings.method.name:
        return ""
    return (
        f"no word of the question counts for the picture, so {methods[0]} alone chose what was kept; ask about something "
        "that can be seen"
    )


def _cache_bytes(cache: Any, length: int | list[int], rows: int | None = None) -> int:
    """Bytes of the keys and values of the first `length` tokens (of each layer), read from the tensors themselves.

    Args:
        rows: how many prompts of the batch; None: all.
    """
    lengths = [length] * len(cache.layers) if isinstance(length, int) else length
    return sum(
        part[:rows, ..., :held, :].numel() * part.element_size()
        for layer, held in zip(cache.layers, lengths, strict=True)
        for part in (layer.keys, layer.values)
        if part is not None
    )


def _check_architecture(config: Any) -> None:
    """Refuse an unsupported model before its weights are loaded."""
    supported = [name for family in known_families() for name in family.model_classes]
    given = list(getattr(config, "architectures", None) or [])
    if given and not set(given).intersection(supported):
        raise unsupported(given[0])


def _check_kernels(config: Any, name: str) -> None:
    """Refuse a checkpoint that names a kernel on the Hub for its attention or experts: that is code as well."""
    configs = [config]
    for each in configs:  # grows while it is read
        configs += [part for part in vars(each).values() if isinstance(part, transformers.PretrainedConfig)]
        for setting in ("_attn_implementation", "_experts_implementation"):
            value = getattr(each, setting, None)
            if isinstance(value, str) and "/" in value:
                raise LoadError(
                    f"cannot load the model {shortened(name)}: its config names the kernel {shortened(value)}, which is code "
                    "from the Hub that adafv does not run; take attn_implementation and experts_implementation out of "
                    "config.json"
                )


def _check_template(session: Session, name: str) -> None:
    """Write one prompt, to find out whether the chat template can be used at all."""
    try:
        within(TEMPLATE_TIMEOUT, lambda: session.prompt("x"))
    except TimeoutError as error:
        raise LoadError(
            f"cannot load the model {shortened(name)}: its chat template writes a prompt for more than "
            f"{TEMPLATE_TIMEOUT:g} s; use the checkpoint's original files"
        ) from error
    except AdaFVError:
        raise
    except Exception as error:  # Jinja's, and whatever a template raises
        raise LoadError(
            f"cannot load the model {shortened(name)}: its chat template cannot write a prompt of one image and one "
            f"question ({type(error).__name__}: {shortened(error)}); use the checkpoint's original files"
        ) from error


@contextlib.contextmanager
def _unattended() -> Iterator[None]:
    """Loading with nobody there to answer, and nobody to read what libraries print: standard output is for the answer.

    `trust_remote_code=False` does not reach every part of a checkpoint in transformers (the tokenizer of a processor that is
    found by the model's type; the parts of a model), and where it does not, transformers would ask.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), open(os.devnull) as nobody:
        warnings.simplefilter("ignore")
        standard_input, sys.stdin = sys.stdin, nobody
        try:
            yield
        finally:
            sys.stdin = standard_input


def _load_error(name: str, error: Exception) -> LoadError:
    reason = f"{type(error).__name__}: {shortened(' '.join(str(error).split()), 300)}"
    if "trust_remote_code" in str(error):
        mend = (
            "it needs Python code that comes with the checkpoint, which adafv never runs; use a checkpoint in the format of "
            "transformers itself (often a second one, with -hf in its name)"
        )
        reason = ""
    elif "cannot be loaded with `safetensors`" in str(error) or (
        "no file named" in str(error) and list(Path(name).glob("*.bin"))
    ):
        mend = (
            "its weights are not safetensors, and others are not read, as they may hold code; convert them with "
            "save_pretrained where you trust them"
        )
    elif Path(name).is_dir():
        mend = "the folder must hold what save_pretrained wrote for the model and for its processor"
    elif Path(name).is_file():
        mend = "give the folder of the checkpoint, not a file"
    else:
        mend = (
            "check the folder or Hub id (such as llava-hf/llava-1.5-7b-hf), the network, and your access to the model"
        )
    return LoadError(f"cannot load the model {shortened(name)}: {mend}" + (f" ({reason})" if reason else ""))
