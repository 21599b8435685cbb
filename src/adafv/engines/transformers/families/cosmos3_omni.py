"""Cosmos 3 (`Cosmos3OmniForConditionalGeneration`, the reasoner of the omni checkpoints): Qwen3-VL under another name.

Tower and language model are Qwen3-VL's own modules, and so are inputs, positions and deepstack features. What the
checkpoints hold besides, to make videos and sound, the stock class does not load.
"""

from adafv.engines.transformers.families.qwen3_vl import Qwen3VL


class Cosmos3Omni(Qwen3VL):
    name = "Cosmos 3"
    model_classes = ("Cosmos3OmniForConditionalGeneration",)
