"""A tiny LLaVA checkpoint on disk, with all that `from_pretrained` reads, to test the real loading code."""

from pathlib import Path

from models import PATCH, SIDE
from processors import processor, speaking_model

TOKENS = (SIDE // PATCH) ** 2


def save_llava(folder: Path, *, chat_template: bool = True, anyres: bool = False) -> Path:
    """Save a random LLaVA-1.5 (or LLaVA-NeXT) with 16 visual tokens per crop, and its processor; return `folder`."""
    family = "llava-next" if anyres else "llava"
    made = processor(family)
    if not chat_template:
        made.chat_template = made.tokenizer.chat_template = None
    speaking_model(family, text={"hidden_size": 32, "num_hidden_layers": 2}).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
