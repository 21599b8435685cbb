"""PaliGemma 2: the language model is Gemma 2, every other layer of which looks through a window."""

import functools
from dataclasses import replace

from models import NO_STATIC_CACHE

from rows.paligemma import ROW as PALIGEMMA
from rows.paligemma import build

ROW = replace(
    PALIGEMMA,
    name="paligemma2",
    build=functools.partial(build, text="gemma2"),
    refuses={**PALIGEMMA.refuses, "static-cache": NO_STATIC_CACHE},
)
