"""Save a checkpoint where the Hub's client keeps downloads, under the name that the documentation uses.

    python hub_checkpoint.py HF_HOME llava-hf/llava-1.5-7b-hf ...

So the documented commands run as they are written, without the Hub: LLaVA-1.5's class, size of picture (336 pixels, 576
visual tokens) and chat template, with random weights and few layers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from models import PATCH
from processors import processor, speaking_model
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE = 336


def save(folder: Path) -> None:
    """Save model and processor into `folder`."""
    made = processor("llava", "vicuna")
    made.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    model = speaking_model("llava", "vicuna", vision={"image_size": SIDE})
    model.config.image_seq_length = (SIDE // PATCH) ** 2
    model.save_pretrained(folder)
    made.save_pretrained(folder)


if __name__ == "__main__":
    home, *names = sys.argv[1:]
    for name in names:
        repository = Path(home) / "hub" / f"models--{name.replace('/', '--')}"
        revision = f"{0:040x}"
        save(repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
