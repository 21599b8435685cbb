"""Models spread over devices by accelerate: its hooks replace `forward` on the modules, and ours must get along."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FamilyRow, make_inputs

from adafv import AdaFV, Pruner
from adafv.errors import UnsupportedModelError

accelerate = pytest.importorskip("accelerate")
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def offloaded(family: FamilyRow, how: str, folder: Path) -> Any:
    model = family.build()
    if how == "cpu-offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk-offload":
        return accelerate.disk_offload(model, str(folder / "offload"), execution_device=torch.device("cpu"))
    model.save_pretrained(folder / "model")
    tower_on_disk = {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "cpu",
        "lm_head": "cpu",
    }
    if family.name == "llava-next":
        tower_on_disk["model.image_newline"] = "cpu"
    device_map = {"cpu": {"": "cpu"}, "auto": "auto", "tower-on-disk": tower_on_disk}[how]
    return type(model).from_pretrained(folder / "model", device_map=device_map, offload_folder=folder / "disk").eval()


@pytest.mark.parametrize("how", ["cpu", "auto", "tower-on-disk", "cpu-offload", "disk-offload"])
def test_device_maps(family: FamilyRow, how: str, tmp_path: Path) -> None:
    plain = family.build()
    inputs = make_inputs(family, plain, [1, 2])
    with torch.no_grad(), AdaFV(keep=0.3)(plain) as adafv:
        expected, logits = plain.generate(**inputs, **GREEDY), plain(**inputs).logits
    model = offloaded(family, how, tmp_path)
    newline_offloaded = family.name == "llava-next" and model.model.image_newline.is_meta
    if newline_offloaded:
        with pytest.raises(NotImplementedError, match="meta"):
            model.generate(**inputs, **GREEDY)  # stock transformers cannot do it
        with AdaFV(keep=0.3)(model), pytest.raises(UnsupportedModelError, match="image_newline"):
            model.generate(**inputs, **GREEDY)
        return
    stock = model.generate(**inputs, **GREEDY)
    with torch.no_grad(), AdaFV(keep=0.3)(model) as handle:
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
        torch.testing.assert_close(model(**inputs).logits, logits, equal_nan=True)
    for mine, theirs in zip(handle.last.kept, adafv.last.kept, strict=True):
        assert torch.equal(mine, theirs)
    tower_offloaded = any(parameter.is_meta for parameter in model.model.vision_tower.parameters())
    with torch.no_grad(), Pruner("downsample", keep=9)(model):
        if tower_offloaded:
            with pytest.raises(UnsupportedModelError, match="offloaded"):
                model.generate(**inputs, **GREEDY)
        else:
            model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), stock)
    assert tower_offloaded == (how in ("tower-on-disk", "cpu-offload", "disk-offload"))
