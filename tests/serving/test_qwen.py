"""Qwen2.5-VL and Qwen3-VL: as in transformers, down to the positions in height and width of what is kept.

The models are small and their weights random, so answers are compared by the log probabilities of all their tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import alike, answers, chat, choices, engine, generate, picture, prompt, sparing, tower_runs
from qwen_checkpoints import BUILDERS, SIDE, qwen
from transformers import AutoModelForImageTextToText, AutoProcessor
from workers import kept_by_each, several_workers

from adafv import AdaFV
from adafv.core import ImageLayout
from adafv.engines.vllm.rotary import BASE, place_channels, places_from
from adafv.errors import PromptError, UnsupportedCallError, UnsupportedModelError

QWEN2_5, QWEN3 = BUILDERS
QUESTION = "What color is the banana?"
SHAPES = {
    "landscape": (5, 11),
    "portrait": (12, 4),
    "square": (8, 8),
    "column": (48, 2),
    "row": (1, 40),
    "smallest": (2, 2),
}
"""Rows and columns of tokens."""
BLOCK = 32


def shown(name: str, rows: int, columns: int) -> Any:
    """A picture that becomes so many tokens."""
    return picture(name).resize((columns * SIDE, rows * SIDE))


TWO = [shown("bird", 11, 4), "Is there a bird?", shown("cars", 3, 9), "How many cars are there?"]
THREE = ["Which?", shown("key", 7, 7), shown("tree", 3, 14), "Is it", shown("boats", 10, 2), "or not?"]


@dataclass
class Qwen:
    """One checkpoint in both engines."""

    folder: Path
    llm: Any
    model: Any
    processor: Any

    @classmethod
    def of(cls, architecture: str, folder: Path, dtype: torch.dtype = torch.float32, **arguments: Any) -> "Qwen":
        saved = qwen(architecture, folder, dtype)
        arguments = {"limit_mm_per_prompt": {"image": 150}, "dtype": dtype, "block_size": BLOCK} | arguments
        llm = engine(saved, architecture, {"keep": 8, "tower_cache_mb": 0}, **arguments)
        model = AutoModelForImageTextToText.from_pretrained(saved, dtype=dtype).eval()
        return cls(saved, llm, model, AutoProcessor.from_pretrained(saved))

    def inputs(self, *turns: Any) -> Any:
        """Of a conversation, as the stock processor makes them."""
        shown = [
            {**turn, "content": [part if part["type"] == "text" else {"type": "image"} for part in turn["content"]]}
            for turn in turns
        ]
        text = self.processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
        pictures = [part["image_pil"] for turn in turns for part in turn["content"] if part["type"] != "text"]
        return self.processor(images=pictures, text=text, return_tensors="pt").to(self.model.dtype)

    def pruned(self, inputs: Any, keep: int | float) -> tuple[list[list[int]], list[int], list[Any]]:
        """In transformers: (kept tokens per image, answer, log probabilities of each of its tokens)."""
        with torch.no_grad(), AdaFV(keep=keep, processor=self.processor)(self.model) as adafv:
            output = self.model.generate(
                **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        shown = any(name.startswith("pixel_values") for name in inputs)
        kept = [indices.tolist() for indices in adafv.last.kept] if shown else []
        logprobs = [step[0].float().log_softmax(-1) for step in output.logits]
        return kept, output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), logprobs

    def forget(self) -> None:
        """Empty vLLM's caches."""
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def agree(self, turns: list[Any], keep: int | float) -> None:
        """Both engines keep the same and say the same."""
        self.forget()
        with choices(self.llm) as chosen:
            output = answers(self.llm, [turns], keep)[0].outputs[0]
        kept, answer, logprobs = self.pruned(self.inputs(*turns), keep)
        if keep != 1.0:  # transformers keeps no record of an image that loses nothing
            assert chosen == kept
        assert list(output.token_ids) == answer
        for step, expected in zip(output.logprobs, logprobs, strict=True):
            for token, given in step.items():
                assert given.logprob == pytest.approx(float(expected[token]), abs=1e-4)

    def positions(self, inputs: Any, kept: list[list[int]]) -> torch.Tensor:
        """[3, tokens that stay] of the stock model, as it counts them in the prompt of whole images."""
        tokens = inputs["input_ids"]
        is_image = tokens == self.model.config.image_token_id
        whole, _ = self.model.model.get_rope_index(
            tokens, mm_token_type_ids=is_image.long(), image_grid_thw=inputs["image_grid_thw"]
        )
        stays = ~is_image[0]
        starts = (is_image[0] & ~is_image[0].roll(1)).nonzero().flatten().tolist()
        for start, indices in zip(starts, kept, strict=True):
            stays[start + torch.tensor(indices)] = True
        return whole[:, 0, stays]


@contextmanager
def positions_read(llm: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the positions with which the language model is run."""
    found: list[torch.Tensor] = []

    def spy(model: Any) -> None:
        inner = model.language_model.model
        forward = inner.forward

        def recording(*args: Any, **kwargs: Any) -> Any:
            found.append(kwargs["positions"].clone())
            return forward(*args, **kwargs)

        inner.forward = recording

    def stop(model: Any) -> None:
        del model.language_model.model.forward

    llm.apply_model(spy)
    yield found
    llm.apply_model(stop)


@pytest.fixture(scope="module", params=list(BUILDERS))
def both(request: pytest.FixtureRequest, checkpoints: Path) -> Qwen:
    return Qwen.of(request.param, checkpoints)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_picture_of_any_shape(both: Qwen, shape: str) -> None:
    for keep in (1, 0.3, 1.0):
        both.agree(chat(shown("bird", *SHAPES[shape]), QUESTION), keep)


def test_several_pictures_in_one_prompt(both: Qwen) -> None:
    for keep in (5, 0.25, 1.0):
        both.agree(chat(*TWO), keep)
        both.agree(chat(*THREE), keep)


def test_the_question_may_stand_in_front(both: Qwen) -> None:
    both.agree(chat(QUESTION, shown("bird", 9, 5)), 7)


def test_the_positions_are_those_of_the_whole_prompt(both: Qwen) -> None:
    for content in (TWO, THREE, [shown("bird", 48, 2), QUESTION]):
        both.forget()
        with choices(both.llm) as chosen, positions_read(both.llm) as read:
            answers(both.llm, [chat(*content)], 5, tokens=3)
        expected = both.positions(both.inputs(*chat(*content)), chosen)
        assert read[0].tolist() == expected.tolist()
        after = expected.max().item() + 1
        assert [step.tolist() for step in read[1:]] == [[[after]] * 3, [[after + 1]] * 3]


def test_a_prompt_may_end_in_a_picture(both: Qwen) -> None:
    """What is generated goes on behind the whole picture, as in stock vLLM, though most of the picture is gone."""
    tokens = both.processor.tokenizer("user:What is it?<|vision_start|><|image_pad|>")["input_ids"]
    asked = {"prompt_token_ids": tokens, "multi_modal_data": {"image": [shown("bird", 3, 20)]}}
    for keep in (4, 1.0):
        with positions_read(both.llm) as read:
            generate(both.llm, [asked | {"mm_processor_kwargs": {"adafv": {"keep": keep}}}], tokens=3)
        start = len(tokens) - 1
        assert read[0][0].unique().tolist() == list(range(start + 1))
        assert [step.tolist() for step in read[1:]] == [[[start + 20]] * 3, [[start + 21]] * 3]


def test_many_requests_in_one_step(both: Qwen) -> None:
    chats = [TWO, THREE, ["Is there a key?"], [shown("bird", 12, 4), QUESTION], [shown("bird", 4, 12), QUESTION]]
    asked = [prompt(both.llm, chat(*content), keep) for content in chats for keep in (4, 0.5, 1.0)]
    alone = [generate(both.llm, [each])[0] for each in asked]
    both.forget()
    assert all(map(alike, generate(both.llm, asked), alone))


def test_the_second_turn_reuses_the_first(both: Qwen) -> None:
    first = chat(*TWO)
    told = {"role": "assistant", "content": [{"type": "text", "text": "one"}]}
    second = [*first, told, *chat(shown("key", 6, 8), "Is there a key?")]
    both.agree(second, 20)
    both.forget()
    alone = answers(both.llm, [second], 20)[0]
    assert alone.num_cached_tokens == 0
    both.forget()
    answer = answers(both.llm, [first], 20)[0]
    with tower_runs(both.llm) as runs:
        again = answers(both.llm, [second], 20)[0]
    assert again.num_cached_tokens == len(answer.prompt_token_ids) // BLOCK * BLOCK > 0
    assert runs == [1]
    assert alike(again, alone)


def test_videos_are_refused(both: Qwen) -> None:
    from vllm.exceptions import VLLMValidationError

    text = "user:<|vision_start|><|video_pad|><|vision_end|>Why?<eos>assistant:"
    tokens = both.processor.tokenizer(text)["input_ids"]
    frames = np.zeros((4, 2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
    video = (frames, {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]})
    with pytest.raises(VLLMValidationError, match=r"At most 0 video\(s\)"):
        generate(both.llm, [{"prompt_token_ids": tokens, "multi_modal_data": {"video": [video]}}])


def test_images_must_fit_the_table_of_rotations(both: Qwen) -> None:
    many = [shown("bird", 1, 4)] * 105
    with pytest.raises(UnsupportedCallError, match="105 images in one prompt could take"):
        answers(both.llm, [chat(*many, QUESTION)], 1)
    answers(both.llm, [chat(*many[:90], QUESTION)], 1)


def test_placeholders_that_someone_writes_are_refused(both: Qwen) -> None:
    with pytest.raises(PromptError, match="2 image placeholders for 1 image"):
        answers(both.llm, [chat(shown("bird", 4, 4), "Is <|image_pad|> a banana?")], 4)


@pytest.mark.parametrize("architecture", sparing(BUILDERS, QWEN2_5))
def test_an_image_may_come_in_chunks(architecture: str, checkpoints: Path) -> None:
    both = Qwen.of(architecture, checkpoints, max_num_batched_tokens=16, max_num_seqs=2, enable_prefix_caching=False)
    with positions_read(both.llm) as read:
        for content, keep in ((TWO, 24), (THREE, 0.5), (TWO, 1.0), ([QUESTION, shown("bird", 12, 8)], 70)):
            both.agree(chat(*content), keep)
    assert max(step.shape[1] for step in read) == 16


@pytest.mark.parametrize("architecture", sparing(BUILDERS, list(BUILDERS)[-1]))
def test_keeping_everything_is_stock_vllm(architecture: str, checkpoints: Path) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    said = []
    for served in (architecture, None):
        llm = engine(
            qwen(architecture, checkpoints),
            served,
            {"keep": 1.0},
            limit_mm_per_prompt={"image": 3, "video": 0},
            mm_processor_cache_gb=0,
        )
        outputs = [answers(llm, [chat(*content)])[0] for content in (TWO, THREE, [QUESTION])]
        said.append(
            [
                (
                    output.prompt_token_ids,
                    list(output.outputs[0].token_ids),
                    [{token: given.logprob for token, given in step.items()} for step in output.outputs[0].logprobs],
                )
                for output in outputs
            ]
        )
        del llm
        cleanup_dist_env_and_memory()
    assert said[0] == said[1]


@pytest.mark.release
def test_two_workers_agree(checkpoints: Path) -> None:
    """Each sees half of the heads."""
    saved = qwen(QWEN2_5, checkpoints)
    model = AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32).eval()
    arguments = {"tensor_parallel_size": 2, "max_num_seqs": 4, "limit_mm_per_prompt": {"image": 3}}
    with several_workers(saved, QWEN2_5, **arguments) as llm:
        both = Qwen(saved, llm, model, AutoProcessor.from_pretrained(saved))
        for content, keep in ((TWO, 5), ([shown("key", 12, 4), QUESTION], 0.3)):
            output = answers(llm, [chat(*content)], keep)[0].outputs[0]
            kept, answer, _ = both.pruned(both.inputs(*chat(*content)), keep)
            assert kept_by_each(llm) == [kept, kept]
            assert list(output.token_ids) == answer


@pytest.mark.release
def test_positions_are_exact_in_bfloat16(checkpoints: Path) -> None:
    both = Qwen.of(QWEN2_5, checkpoints, torch.bfloat16)
    content = [shown("bird", 2, 48), "and", shown("cars", 48, 2), QUESTION]
    with choices(both.llm) as chosen, positions_read(both.llm) as read:
        answers(both.llm, [chat(*content)], 20, tokens=1)
    assert read[0].tolist() == both.positions(both.inputs(*chat(*content)), chosen).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_and_columns_survive_every_type(dtype: torch.dtype) -> None:
    columns = BASE**2 - 1
    layout = ImageLayout(torch.arange(2 * columns), crops=1, rows=2, columns=columns)
    found = places_from(place_channels(layout, layout.source).to(dtype))
    assert found.tolist() == [layout.place(layout.source)[1].tolist(), layout.place(layout.source)[2].tolist()]


def test_what_would_lose_positions_is_refused(checkpoints: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from adafv.engines.vllm.rotary import check_positions

    arguments = {"model": str(qwen(QWEN2_5, checkpoints)), "max_model_len": 256}
    check_positions(EngineArgs(**arguments).create_engine_config())
    with pytest.raises(UnsupportedModelError, match="--pipeline-parallel-size"):
        check_positions(EngineArgs(**arguments, pipeline_parallel_size=2).create_engine_config())
