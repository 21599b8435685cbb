"""Models sharded by FSDP2 (`fully_shard`), in one process: answers and gradients are those of the model as it was."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import FAMILIES, IMAGE, FamilyRow, make_inputs
from oracle import VISUAL_INPUTS
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from adafv import AdaFV, encode
from adafv.errors import UnsupportedCallError

ROWS = [
    row for row in FAMILIES if row.name in ("llava", "llava-siglip", "internvl", "mistral3", "qwen2.5-vl", "gemma3")
]
SHARDED = {
    "root": ["root"],
    "tower": ["tower"],
    "base": ["base"],
    "layers, tower and root": ["layers", "tower", "root"],
    "tower and base": ["tower", "base"],
}
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = "0"
    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(row: FamilyRow, how: str, mesh: DeviceMesh) -> Any:
    model = row.build()
    base = model.model
    tower = base.visual if hasattr(base, "visual") else base.vision_tower
    parts = {"root": [model], "base": [base], "tower": [tower], "layers": list(base.language_model.layers)}
    for name in SHARDED[how]:
        for part in parts[name]:
            fully_shard(part, mesh=mesh)
    return model


@pytest.mark.each  # how parts are sharded does not depend on the family
@pytest.mark.parametrize("how", SHARDED)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_images_that_are_encoded_before_anything_else_runs(row: FamilyRow, how: str, mesh: DeviceMesh) -> None:
    plain = row.build()
    inputs = make_inputs(row, plain, [1, 2])
    text = {name: value for name, value in inputs.items() if name not in VISUAL_INPUTS}
    model = sharded(row, how, mesh)
    with torch.no_grad(), AdaFV(keep=0.3)(plain):
        expected = plain(**inputs).logits
    encoded = encode(model, inputs)
    with torch.no_grad(), AdaFV(keep=0.3)(model):
        for _ in range(2):
            found = model(**text, images=encoded).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.each  # how parts are sharded does not depend on the family
@pytest.mark.parametrize("how", SHARDED)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_sharded(row: FamilyRow, how: str, mesh: DeviceMesh) -> None:
    plain = row.build()
    inputs = make_inputs(row, plain, [1, 2])
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    with AdaFV(keep=0.3)(plain):
        answer = plain.generate(**inputs, **GREEDY)
        with torch.no_grad():
            logits = plain(**inputs).logits
        plain(**inputs, labels=labels).loss.backward()

    model = sharded(row, how, mesh)
    cls = type(model)
    with AdaFV(keep=0.3)(model), torch.no_grad():
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **GREEDY), answer)
            torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert type(model) is cls

    model = sharded(row, how, mesh)
    with AdaFV(keep=0.3)(model):
        if "base" in SHARDED[how]:
            with pytest.raises(UnsupportedCallError, match="gradients of the projector would be lost"):
                model(**inputs, labels=labels)
            for name, parameter in model.model.named_parameters():
                parameter.requires_grad_(name.startswith("language_model."))
            model(**inputs, labels=labels).loss.backward()
        else:
            model(**inputs, labels=labels).loss.backward()
    tied = plain.config.tie_word_embeddings and "base" in SHARDED[how]  # then fully_shard unties them
    for (name, mine), theirs in zip(model.model.named_parameters(), plain.model.parameters(), strict=True):
        if tied and "embed_tokens" in name:
            continue
        if mine.requires_grad and theirs.grad is not None:
            gradient = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
            torch.testing.assert_close(gradient, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)
