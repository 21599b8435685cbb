"""North Micro Vision (`CohereCompassForConditionalGeneration`): Qwen3-VL's tower in front of a Cohere language model.

Inputs, positions and deepstack features are Qwen3-VL's. In the language model some layers look back over a sliding window,
counted in tokens of the prompt that the model sees: in a pruned prompt they look further back. Some have no positions at
all.
"""

from adafv.engines.transformers.families.qwen3_vl import Qwen3VL


class CohereCompass(Qwen3VL):
    name = "North Micro Vision"
    model_classes = ("CohereCompassForConditionalGeneration",)
