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

METHOD = "Method"
"""Heading of the options that say how to prune."""

MethodOption = Annotated[str, typer.Option(help="How tokens are chosen; see `adafv methods`.", rich_help_panel=METHOD)]
ObjectiveOption = Annotated[
    str | None, typer.Option(help="Of method adafv: joint (default) or split.", rich_help_panel=METHOD)
]
TextOption = Annotated[
    str | None,
    typer.Option(help="Which text counts: question, turn or after. Default: question.", rich_help_panel=METHOD),
]
