"""`adafv env`: what a bug report needs to know of this machine."""

import json
from typing import Annotated

import typer

from adafv.cli.failures import failures_as_messages, put


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a bug report needs: releases, devices, and the families that this transformers has.

    Nothing of yours is in it: no path, no name of user or machine, no environment variable.
    """
    with failures_as_messages():
        from adafv.environment import as_text, environment

        facts = environment()
        put(json.dumps(facts) if as_json else as_text(facts))
