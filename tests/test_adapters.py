"""PEFT adapters: a model that was fine-tuned with LoRA is pruned like any other, merged or not.

`PeftModel` keeps the stock model inside and calls its `forward` and `generate`, so that is the model to wrap.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, IMAGE, FamilyRow, make_inputs
from oracle import equal, masked_inputs, same_logits
from shortened import shortened_by_hand
from test_wrapper import state
from torch import Tensor

from adafv import AdaFV, Pruner, compress

peft = pytest.importorskip("peft")

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
KEEP = 0.3
GREEDY = {"max_new_tokens": 3, "do_sample": False}
rows = pytest.mark.parametrize(
    "row", [row for row in FAMILIES if row.name in ("llava", "llava-next")], ids=lambda row: row.name
)

LANGUAGE = r".*language_model.*(q_proj|v_proj|up_proj)"
TOWER = r".*vision_tower.*(q_proj|k_proj|v_proj)"
BOTH = r".*(language_model|vision_tower).*(q_proj|k_proj|v_proj)"
ADAPTERS: dict[str, dict[str, Any]] = {
    "language-model": {"target_modules": LANGUAGE},
    "tower": {"target_modules": TOWER},
    "both": {"target_modules": BOTH},
    "words": {"target_modules": ["embed_tokens"]},
    "projector-trained-whole": {"target_modules": LANGUAGE, "modules_to_save": ["multi_modal_projector"]},
    "dora": {"target_modules": BOTH, "use_dora": True},
}
"""What is adapted. The last but one is how LLaVA itself is fine-tuned with LoRA."""


def adapted(row: FamilyRow, adapter: str = "both", task: str | None = None, seed: int = 0) -> Any:
    """A model with an adapter that matters: PEFT's own start is one that changes nothing."""
    return peft.get_peft_model(row.build(), lora(adapter, task, seed)).eval()


def lora(adapter: str, task: str | None = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type=task, **ADAPTERS[adapter])


def assert_oracle(model: Any, inputs: dict[str, Any], logits: Tensor, keep_mask: Tensor) -> None:
    """`logits` are those of `model` on the whole prompt with the dropped tokens masked."""
    oracle = masked_inputs(inputs, keep_mask)
    same_logits(logits, model(**oracle).logits, inputs["attention_mask"], keep_mask, **TOLERANCE)


@pytest.mark.pairs
@rows
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_unmerged(row: FamilyRow, adapter: str, task: str | None) -> None:
    model = adapted(row, adapter, task)
    stock_model = model.get_base_model()
    inputs = make_inputs(row, row.build(), [1, 2])
    with torch.no_grad():
        stock, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        with model.disable_adapter():
            assert (model(**inputs).logits - stock).abs().max() > 0.1  # else this test could not fail
        before = state(model)
        with AdaFV(keep=1.0)(stock_model):
            assert torch.equal(model(**inputs).logits, stock)
        with AdaFV(keep=KEEP)(stock_model) as adafv:
            logits, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        assert state(model) == before
        assert_oracle(model, inputs, logits, adafv.last.keep_mask)
        expected = model.generate(**masked_inputs(inputs, adafv.last.keep_mask), **GREEDY)
        assert tokens.tolist() == expected.tolist()
        assert torch.equal(model.generate(**inputs, **GREEDY), answer)


@pytest.mark.each
@rows
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "projector-trained-whole"])
def test_merged(row: FamilyRow, adapter: str) -> None:
    model = adapted(row, adapter)
    inputs = make_inputs(row, row.build(), [1, 2])
    with torch.no_grad(), AdaFV(keep=KEEP)(model.get_base_model()) as adafv:
        unmerged = model(**inputs).logits
    merged = model.merge_and_unload()
    assert type(merged) is type(row.build())
    with torch.no_grad(), AdaFV(keep=KEEP)(merged) as handle:
        logits = merged(**inputs).logits
    torch.testing.assert_close(logits, unmerged, atol=1e-4, rtol=1e-4, equal_nan=True)
    for mine, theirs in zip(handle.last.kept, adafv.last.kept, strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        assert_oracle(merged, inputs, logits, handle.last.keep_mask)


@pytest.mark.each
@rows
@pytest.mark.parametrize("adapter", ["tower", "both", "dora"])
def test_saliency_is_read_through_the_adapter(row: FamilyRow, adapter: str) -> None:
    model = adapted(row, adapter)
    stock_model = model.get_base_model()
    inputs = make_inputs(row, row.build(), [1])
    tower = stock_model.model.vision_tower
    with torch.no_grad():
        with Pruner("saliency", keep=KEEP)(stock_model) as pruner:
            model(**inputs)
            read = pruner.last.saliency[0]
            with model.disable_adapter():
                model(**inputs)
            without = pruner.last.saliency[0]
        tower.set_attn_implementation("eager")
        maps = tower(inputs["pixel_values"].flatten(0, -4), output_attentions=True).attentions
    expected = maps[-2][:, :, 0, 1:].mean(1).flatten()  # hidden state -2 is the output of the last layer but one
    layout = pruner.last.layouts[0]
    shown = layout.shows_patch
    torch.testing.assert_close(read[shown], expected[layout.source[shown]], atol=1e-6, rtol=1e-5)
    assert (read[shown] - without[shown]).abs().max() > 1e-3


@rows
def test_words_are_compared_as_adapted(row: FamilyRow) -> None:
    """With an adapter on the embeddings, the words of the text-to-image attention are the adapted ones."""
    model = adapted(row, "words")
    inputs = make_inputs(row, row.build(), [1])
    with torch.no_grad(), Pruner("text", keep=KEEP)(model.get_base_model()) as pruner:
        model(**inputs)
        read = pruner.last.text_attention[0]
        with model.disable_adapter():
            model(**inputs)
        without = pruner.last.text_attention[0]
    merged = model.merge_and_unload()
    with torch.no_grad(), Pruner("text", keep=KEEP)(merged) as handle:
        merged(**inputs)
    torch.testing.assert_close(read, handle.last.text_attention[0], **TOLERANCE, equal_nan=True)
    assert (read - without).nan_to_num().abs().max() > 1e-3


@rows
def test_switching_adapters_inside_the_block(row: FamilyRow) -> None:
    """Each call is of the adapter that is active at it, and chooses its tokens by it."""
    model = adapted(row)
    model.add_adapter("other", lora("both", seed=7))
    model.eval()
    stock_model, plain = model.get_base_model(), row.build()
    inputs = make_inputs(row, plain, [1, 2])
    kept = {}
    with torch.no_grad():
        for adapter in ("default", "other", "default", "none"):
            with AdaFV(keep=KEEP)(stock_model) as adafv:
                if adapter == "none":
                    with model.disable_adapter():
                        logits = model(**inputs).logits
                else:
                    model.set_adapter(adapter)
                    logits = model(**inputs).logits
            last = adafv.last
            if adapter == "none":
                assert_oracle(plain, inputs, logits, last.keep_mask)
            else:
                assert_oracle(model, inputs, logits, last.keep_mask)
            assert torch.equal(last.keep_mask, kept.setdefault(adapter, last.keep_mask))
    assert not torch.equal(kept["default"], kept["other"])
    assert not torch.equal(kept["default"], kept["none"])


@rows
def test_adapters_mixed_in_one_batch(row: FamilyRow) -> None:
    """PEFT's `adapter_names`: another adapter for each prompt of a batch."""
    model = adapted(row, "language-model")
    model.add_adapter("other", lora("language-model", seed=7))
    model.eval()
    inputs = make_inputs(row, row.build(), [1, 1])
    names = ["other", "default"]
    with torch.no_grad(), AdaFV(keep=KEEP)(model.get_base_model()) as adafv:
        logits = model(**inputs, adapter_names=names).logits
        tokens = model.generate(**inputs, **GREEDY, adapter_names=names)
    oracle = masked_inputs(inputs, adafv.last.keep_mask)
    with torch.no_grad():
        expected = model(**oracle, adapter_names=names).logits
        answers = model.generate(**oracle, **GREEDY, adapter_names=names)
    torch.testing.assert_close(logits[:, -1], expected[:, -1], **TOLERANCE)
    assert tokens.tolist() == answers.tolist()


@pytest.mark.pairs
@rows
@pytest.mark.parametrize("adapter", ["language-model", "both", "projector-trained-whole"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "not-reentrant", "reentrant"])
def test_gradients_of_the_adapter(row: FamilyRow, adapter: str, checkpointing: bool | None) -> None:
    model = adapted(row, adapter).train()
    inputs = make_inputs(row, row.build(), [1, 2], "right")
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE), -100)
    # The token right after an image is predicted from the last visual token, which may be dropped: not comparable.
    labels = labels.masked_fill((inputs["input_ids"] == IMAGE).roll(1, 1), -100)
    if checkpointing is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with AdaFV(keep=KEEP)(model.get_base_model()) as adafv:
        pruned = model(**inputs, labels=labels)
        pruned.loss.backward()
    mine = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    expected = model(**masked_inputs(inputs, adafv.last.keep_mask), labels=labels)
    expected.loss.backward()
    theirs = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    torch.testing.assert_close(pruned.loss, expected.loss, **TOLERANCE)
    assert mine.keys() == theirs.keys()
    assert all("lora" in name or "modules_to_save" in name for name in mine)
    assert any("vision_tower" in name for name in mine) == (adapter == "both")
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-4, msg=name)


@rows
def test_saved_from_inside_the_block(row: FamilyRow, tmp_path: Path) -> None:
    model = adapted(row, "projector-trained-whole")
    inputs = make_inputs(row, row.build(), [1])
    with torch.no_grad(), AdaFV(keep=KEEP)(model.get_base_model()):
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        twin = copy.deepcopy(model)  # a copy is not wrapped
        full = twin(**inputs).logits
    again = peft.PeftModel.from_pretrained(row.build(), tmp_path).eval()
    with torch.no_grad(), AdaFV(keep=KEEP)(again.get_base_model()):
        assert equal(again(**inputs).logits, expected)
    assert full.shape[1] == inputs["input_ids"].shape[1]


@rows
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("images", [[1], [1, 2]], ids=str)
def test_virtual_tokens(row: FamilyRow, kind: str, images: list[int]) -> None:
    """Prompt and prefix tuning put trained tokens in front: they stay, and are no text that a question is made of."""
    torch.manual_seed(0)
    model = peft.get_peft_model(row.build(), getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "prompt_encoder" in name:
                value.copy_(torch.randn_like(value))
    stock_model = model.get_base_model()
    inputs = make_inputs(row, row.build(), images)
    options = {**GREEDY, "min_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), AdaFV(keep=KEEP)(stock_model) as adafv:
        answer, record = model.generate(**inputs, **options), adafv.last
        logits, of_forward = model(**inputs).logits, adafv.last
    with torch.no_grad():
        short = shortened_by_hand(stock_model, inputs, record)
        expected = model.generate(**short, **options)
        assert torch.equal(torch.stack(answer.logits), torch.stack(expected.logits))
        if len(images) == 1:  # in `forward`, PEFT puts the tokens in front of the padding; how far that is changes
            expected = model(**shortened_by_hand(stock_model, inputs, of_forward))
            torch.testing.assert_close(logits[:, -1], expected.logits[:, -1], **TOLERANCE)


def test_the_peft_model_itself_can_be_wrapped() -> None:
    """It runs `forward` and `generate` through the model inside it, so both ways to wrap are the same."""
    row = next(row for row in FAMILIES if row.name == "llava")
    model = adapted(row)
    inputs = make_inputs(row, model.get_base_model(), [1])
    with torch.no_grad(), AdaFV(keep=KEEP)(model.get_base_model()):
        inside = model(**inputs).logits
    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        outside = model(**inputs).logits
    assert adafv.last.tokens_after[0] < adafv.last.tokens_before[0]
    torch.testing.assert_close(inside, outside, atol=0, rtol=0, equal_nan=True)
    short = compress(model, inputs, keep=KEEP)
    with torch.no_grad():
        assert torch.equal(model(**short).logits[:, -1], inside[:, -1])
