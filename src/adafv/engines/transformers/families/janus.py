"""Janus (`JanusForConditionalGeneration`): to understand images it is built as DeepSeek-VL is, with a tower of its own.

It also draws. That way of generating sees no images, so calls of it that bring any are refused; without images they go
to the stock model untouched. The stock model also ignores `guidance_scale` when it writes text.
"""

from adafv.engines.transformers.families.deepseek_vl import DeepseekVL


class Janus(DeepseekVL):
    name = "Janus"
    model_classes = ("JanusForConditionalGeneration",)
    limits = "refuses images in a call that draws (generation_mode='image')"
