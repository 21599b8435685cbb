"""What lmms-eval finds through its entry point `lmms_eval.models`: where the model `adafv` is, without importing it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

NAME = "adafv"
"""`lmms-eval --model adafv`."""


def manifest() -> "ModelManifest":
    """The payload of the entry point. An error here would take every other package's models down, so it does nothing else."""
    from lmms_eval.models.registry_v2 import ModelManifest

    home = "adafv.evaluation.lmms"
    return ModelManifest(NAME, simple_class_path=f"{home}.AdaFVSimple", chat_class_path=f"{home}.AdaFVChat")
