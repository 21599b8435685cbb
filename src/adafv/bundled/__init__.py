"""What comes with adafv: a small model, trained twice, in two forms each, and pictures to ask it about.

The model has 5 million parameters and was trained from nothing on generated scenes: drawings of everyday objects, large
and striking or small and faint, on plain backgrounds. It is there so that everything can be tried, and tested, without a
download. Its vocabulary is closed: it knows a few dozen words and reads every other one as <unk>. It has never seen a
photograph of anything that it could name. What pruning changes in it is no evidence about large models.

    from transformers import AutoModelForImageTextToText, AutoProcessor
    from adafv.bundled import bundled_model

    model = AutoModelForImageTextToText.from_pretrained(bundled_model())
    processor = AutoProcessor.from_pretrained(bundled_model())

How it was made: the folder `training` of the source repository.
"""

from pathlib import Path

from adafv.errors import OptionError

MODELS = ("llava", "llava-next", "llava-details", "llava-details-next")
"""Names: two models, each in two forms that share all weights but one vector, `image_newline`. The second was trained in one
run of the recipe as it stands, on letters and fine patterns as well, for which its twin needs its crops."""

_FOLDER = Path(__file__).parent


def bundled_model(name: str = "llava") -> Path:
    """The folder of the bundled model, for `from_pretrained`.

    Args:
        name: "llava" for a `LlavaForConditionalGeneration`, which sees a picture as 144 visual tokens; "llava-next" for
            its twin, a `LlavaNextForConditionalGeneration`, which sees it in up to five crops; "llava-details" and
            "llava-details-next" for those that have learned details. A twin's index names the weights of the first by
            their place beside it, so copy both folders or neither.

    Raises:
        OptionError: there is no model of that name.
    """
    if name not in MODELS:
        raise OptionError(f"no model called {name!r} comes with adafv; there are: {', '.join(MODELS)}")
    return _FOLDER / name


def sample_pictures() -> list[Path]:
    """The bundled pictures, PNG files of 432 x 432 pixels, by name.

    They are scenes of the kind the model was trained on, but with objects that never stood together in training.
    `samples.json` beside them holds, for each, a question with its right answer, and a caption.
    """
    return sorted((_FOLDER / "samples").glob("*.png"))
