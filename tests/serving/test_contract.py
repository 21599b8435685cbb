"""Methods of a third party inside vLLM: each kind of them keeps, mixes and says what it does in transformers.

They come as another distribution's would, by entry points, which is how workers in processes of their own find them.
What they do in transformers is held to plain loops by tests/test_contract.py.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from both import Both
from engines import answers, chat, choices, engine, picture, sparing
from qwen_checkpoints import SIDE, qwen
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm.distributed import cleanup_dist_env_and_memory
from workers import kept_by_each, llava, several_workers

from adafv import Pruner
from adafv.core import ImageLayout
from adafv.engines.serving.settings import ServerSettings
from adafv.errors import MethodError
from adafv.methods import found_methods

TESTS = Path(__file__).parents[1]
CLASSES = {"far": "Far", "merging": "Merging", "rounding": "Rounding", "looking": "Looking", "counting": "Counting"}
SERVED = ["far", "merging", "rounding", "looking"]


@pytest.fixture(autouse=True, scope="module")
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("third-party")
    metadata = folder / "contract_methods-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: contract-methods\nVersion: 1.0\n")
    entries = "\n".join(f"{name} = contract:{value}" for name, value in CLASSES.items())
    (metadata / "entry_points.txt").write_text(f"[adafv.methods]\n{entries}\n")
    with pytest.MonkeyPatch.context() as patch:
        for path in (str(folder), str(TESTS)):
            patch.syspath_prepend(path)
        paths = [str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        found_methods.cache_clear()
        yield
    found_methods.cache_clear()
    sys.modules.pop("contract", None)


@pytest.mark.parametrize("method", sparing(SERVED, "rounding"))
@pytest.mark.parametrize("name", sparing(["llava", "llava-next"], "llava-next"))
def test_as_in_transformers(name: str, method: str, checkpoints: Path) -> None:
    both = Both.of(name, checkpoints, {"keep": 16, "method": method})
    for keep in (12, 0.3):
        both.agree([picture("bird").resize((500, 260)), "What color is the banana?"], keep, method)
    both.agree([picture("cars"), "How many?", picture("key"), "Is there a key?"], 8, method)


@pytest.mark.parametrize("method", sparing(SERVED, "merging"))
def test_rows_of_later_layers_too(method: str, checkpoints: Path) -> None:
    """Qwen3-VL: "deepstack" rows are mixed by the same weights, or the answers differ."""
    gc.collect()
    architecture = "Qwen3VLForConditionalGeneration"
    folder = qwen(architecture, checkpoints)
    shown = picture("bird").resize((7 * SIDE, 5 * SIDE))
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    llm = engine(folder, architecture, {"keep": 8, "method": method}, dtype="float32")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which color?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[shown], text=text, return_tensors="pt")
    for keep in (8, 0.3):
        with choices(llm) as chosen:
            output = answers(llm, [chat(shown, "Which color?")], keep)[0].outputs[0]
        with torch.no_grad(), Pruner(method, keep, processor=processor)(model) as pruner:
            found = model.generate(
                **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        assert chosen == [pruner.last.kept[0].tolist()]
        assert list(output.token_ids) == found.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        for step, logits in zip(output.logprobs, found.logits, strict=True):
            expected = logits[0].float().log_softmax(-1)
            for token, given in step.items():
                assert given.logprob == pytest.approx(float(expected[token]), abs=1e-4)


@pytest.mark.release
def test_two_workers_mix_by_the_same_weights(checkpoints: Path) -> None:
    folder = llava("clip", checkpoints)
    cleanup_dist_env_and_memory()
    both = Both(None, AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder))
    content: list[Any] = [picture("bird"), "What color is the banana?"]
    for method in ("merging", "looking"):
        options = {"method": method}
        with several_workers(folder, options=options, tensor_parallel_size=2) as two:
            [output] = answers(two, [chat(*content)], 12)
            kept = kept_by_each(two)
        expected, answer, first = both.in_transformers(content, Pruner(method, 12, processor=both.processor))
        assert kept == [expected, expected]
        assert list(output.outputs[0].token_ids) == answer
        for token, given in output.outputs[0].logprobs[0].items():
            assert given.logprob == pytest.approx(float(first[token]), abs=2e-4)


def test_what_vllm_cannot_count_before_the_tower() -> None:
    settings = ServerSettings.of({"keep": 8, "method": "counting"})
    with pytest.raises(MethodError, match=r"counting counts its tokens after the tower.*use another method"):
        settings.plan(ImageLayout(torch.arange(16), 1, 4, 4), settings.budget, words=True)
