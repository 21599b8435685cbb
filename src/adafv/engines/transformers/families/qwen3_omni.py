"""Qwen3-Omni (`Qwen3OmniMoeThinkerForConditionalGeneration`): Qwen3-VL that also hears.

As with Qwen2.5-Omni the part that sees is the thinker, and what that file says about sound and attention masks holds
here. The tower is Qwen3-VL's, with features for several language layers; a video is one row of placeholders. Positions
are not whole numbers where the seconds between frames are not.
"""

from adafv.engines.transformers.families.qwen2_5_omni import Thinker
from adafv.engines.transformers.families.qwen3_vl import Qwen3VL


class Qwen3Omni(Thinker, Qwen3VL):
    name = "Qwen3-Omni"
    model_classes = ("Qwen3OmniMoeThinkerForConditionalGeneration",)
