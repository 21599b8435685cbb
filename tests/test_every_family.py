"""What is not about decoding, for every family: offloading, threads, copies, checkpointed training, a compiled model."""

import copy
import threading
from typing import Any

import pytest
import torch
from fixtures import often
from models import IMAGE, VIDEO, FamilyRow, make_inputs

from adafv import AdaFV

GREEDY = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
KEEP = 0.3


@pytest.mark.parametrize(
    "any_family",
    often(
        *("llava", "llava-next", "llava-onevision", "qwen2.5-vl", "qwen3-vl", "internvl", "gemma3", "gemma4"),
        *("mistral3", "idefics3", "glm-4v", "deepseek-vl-hybrid", "kimi-k2.5", "video-llama3"),
    ),
)
def test_offloaded_to_the_cpu(any_family: FamilyRow, any_model: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    inputs = make_inputs(any_family, any_model, [1, 1])
    with AdaFV(keep=KEEP)(any_model) as adafv:
        expected, kept = any_model.generate(**inputs, **GREEDY), adafv.last.kept
    model = any_family.build()
    base = model.model
    names = [name for name, _ in base.named_children()]
    for name in names:  # not the base model itself: some hold parameters that the stock model reads from outside
        accelerate.cpu_offload(getattr(base, name), execution_device=torch.device("cpu"))
    if not any_family.offloads:
        with pytest.raises(RuntimeError, match="meta"):
            model.generate(**inputs, **GREEDY)  # stock transformers cannot do it
        with AdaFV(keep=KEEP)(model), pytest.raises(RuntimeError, match="meta"):
            model.generate(**inputs, **GREEDY)
        return
    stock = model.generate(**inputs, **GREEDY)
    with AdaFV(keep=KEEP)(model) as adafv:
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert all(torch.equal(one, two) for one, two in zip(adafv.last.kept, kept, strict=True))
    assert torch.equal(model.generate(**inputs, **GREEDY), stock)


def test_two_threads(any_family: FamilyRow, any_model: Any) -> None:
    """Also of a stock model that keeps something of a call on itself, as Qwen keeps its positions."""
    options = {**GREEDY, "max_new_tokens": 4}  # long enough for one to begin while the other decodes
    jobs = [make_inputs(any_family, any_model, [number], seed=number) for number in (1, 2)]
    with AdaFV(keep=KEEP)(any_model) as adafv:
        alone = [(any_model.generate(**inputs, **options), adafv.last.kept) for inputs in jobs]
        found: list[list[Any]] = [[], []]
        begin = threading.Barrier(2)

        def work(number: int) -> None:
            begin.wait(60)
            for _ in range(2):
                found[number].append((any_model.generate(**jobs[number], **options), adafv.last.kept))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, (expected, kept_alone) in enumerate(alone):
        assert len(found[number]) == 2
        for tokens, kept in found[number]:
            assert torch.equal(tokens, expected)
            assert len(kept) == 1 + number
            assert all(torch.equal(one, two) for one, two in zip(kept, kept_alone, strict=True))


def test_a_copy_is_an_unwrapped_model(any_family: FamilyRow, any_model: Any) -> None:
    inputs = make_inputs(any_family, any_model, [1])
    with torch.no_grad():
        stock = any_model(**inputs).logits
        with AdaFV(keep=KEEP)(any_model):
            twin = copy.deepcopy(any_model)
            assert any_model(**inputs).logits.isnan().any()
        assert type(twin) is type(any_model)
        assert torch.equal(twin(**inputs).logits, stock)


def test_checkpointed_training(any_family: FamilyRow) -> None:
    model, plain = any_family.build(), any_family.build()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    inputs = make_inputs(any_family, model, [1, 1])
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | visual, -100)
    for each in (model, plain):
        each.train()
        with AdaFV(keep=KEEP)(each):
            each(**inputs, labels=labels).loss.backward()
    reached = 0
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)
            reached += "language_model" not in name and "lm_head" not in name
    assert reached  # the tower or the projector, through the tokens that stayed
