"""GLM-OCR (`GlmOcrForConditionalGeneration`): a small GLM-4.1V for documents.

Its tower has the layers of GLM-4.1V's, less the learned positions and with a norm on query and key; both stand before
the attention that is tapped. Everything else, also the one placeholder for images and videos, is GLM-4.1V's.
"""

from adafv.engines.transformers.families.glm4v import Glm4V


class GlmOcr(Glm4V):
    name = "GLM-OCR"
    model_classes = ("GlmOcrForConditionalGeneration",)
