"""Options that several commands have."""

from typing import Annotated

import typer

ModelOption = Annotated[
    str,
    typer.Option(
        envvar="ADAFV_MODEL",
        help="Folder of a checkpoint, its id on the Hugging Face Hub, or bundled or bundled-next. "
        "Default: bundled, a small model that comes with adafv.",
        show_default=False,
    ),
]
