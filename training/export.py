"""Write a trained model as the stock checkpoints that come with adafv.

    python -m training.export training/run/together.pt

Two folders, `llava-details` and `llava-details-next`, that stock `from_pretrained` loads; `--name llava` for `llava` and
`llava-next`. The weights lie in the first once, in half precision; the index of the second points to them and to one small
file of its own, with the newline vector.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from training.architecture import llava_config, llava_next_config, llava_next_processor, llava_processor
from training.stages import Pupil
from training.vocabulary import END, PAD

FOLDER = Path(__file__).parents[1] / "src" / "adafv" / "bundled"
WEIGHTS, INDEX, NEWLINE = "model.safetensors", "model.safetensors.index.json", "newline.safetensors"


def export(pupil: Pupil, folder: Path, first: str = "llava-details") -> None:
    """Write `first` and its twin, `first` with "-next" behind it, into a folder."""
    metadata, twin = {"format": "pt"}, f"{first}-next"
    for name, architecture, config, processor in (
        (first, "LlavaForConditionalGeneration", llava_config(), llava_processor()),
        (twin, "LlavaNextForConditionalGeneration", llava_next_config(), llava_next_processor()),
    ):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        config.dtype = torch.float32  # what `dtype="auto"` computes in; the file is half as large
        config.architectures = [architecture]
        config.save_pretrained(target)
        processor.save_pretrained(target)
        GenerationConfig(eos_token_id=END, pad_token_id=PAD, max_new_tokens=60, do_sample=False).save_pretrained(target)
    weights = {
        name: value.to(torch.float16).contiguous()
        for name, value in pupil.llava.state_dict().items()
        if name != "lm_head.weight"  # tied to the word embeddings
    }
    save_file(weights, folder / first / WEIGHTS, metadata)
    newline = {"model.image_newline": pupil.newline.detach().to(torch.float16)}
    save_file(newline, folder / twin / NEWLINE, metadata)
    files = dict.fromkeys(weights, f"../{first}/{WEIGHTS}") | dict.fromkeys(newline, NEWLINE)
    size = sum(value.numel() * 2 for value in (*weights.values(), *newline.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    for path in (folder / first / WEIGHTS, folder / twin / NEWLINE):
        path.chmod(0o644)  # as all other files; safetensors writes for the owner alone
    (folder / twin / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the trained model as stock checkpoints.")
    parser.add_argument("weights", type=Path, help="the last stage's weights, such as training/run/together.pt")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--name", default="llava-details", help="of the first folder; the other has -next behind it")
    options = parser.parse_args()
    pupil = Pupil()
    pupil.load_state_dict(torch.load(options.weights, weights_only=True), strict=False)
    export(pupil, options.output, options.name)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
