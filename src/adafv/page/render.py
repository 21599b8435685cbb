"""Results as HTML. Whatever a user or a model wrote is escaped; drawings are part of the page, so no file is left over."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from adafv.page.answers import Result
from adafv.picture import Panel

NOTHING_YET = '<p class="adafv-nothing-yet">The answers will stand here: unpruned, and by every method.</p>'


def results_as_html(results: Sequence[Result]) -> str:
    """One card per way to run, and the drawings of each method below. The first result is the unpruned one."""
    unpruned, *pruned = results
    cards = "".join(_card(result, unpruned) for result in results)
    methods = "".join(_drawings(result) for result in pruned)
    return (
        f'<div class="adafv-cards">{cards}</div>'
        '<p class="adafv-small">First token: tower, selection, reading the prompt and one token; the median of three runs. '
        "The tower is timed once a picture, which counts in every figure, and the unpruned model once a question. "
        "KV cache: keys and values of the prompt.</p>"
        f'<div class="adafv-methods">{methods}</div>'
        '<p class="adafv-small adafv-legend">less <span class="adafv-scale" role="img" '
        'aria-label="from dark violet to yellow"></span> more; colours follow the square root of the score.</p>'
    )


def problem_as_html(text: str) -> str:
    """Why there is no answer; screen readers announce it."""
    return f'<p class="adafv-problem" role="alert">{escape(text)}</p>'


def warning_as_html(text: str) -> str:
    """What to know about an answer; nothing where there is nothing to know."""
    return f'<p class="adafv-warning" role="status">{escape(text)}</p>' if text else ""


def _card(result: Result, unpruned: Result) -> str:
    timing, before = result.timing, unpruned.timing
    answer = escape(timing.answer) or "<em>no words</em>"
    share = timing.tokens / result.tokens_before
    facts = "".join(
        f"<div><dt>{name}</dt><dd>{value}{'' if result is unpruned else _change(now, then)}</dd></div>"
        for name, value, now, then in (
            ("visual tokens", f"{timing.tokens} of {result.tokens_before}", timing.tokens, before.tokens),
            ("first token", f"{timing.median:.3g} s", timing.median, before.median),
            ("KV cache", f"{timing.kv_mib:.3g} MiB", timing.kv_mib, before.kv_mib),
        )
    )
    return (
        f'<article class="adafv-card" data-name="{escape(timing.name)}"><h3>{escape(timing.name)}</h3>'
        f'<p class="adafv-answer">{answer}</p>'
        f'<div class="adafv-share" aria-hidden="true"><span style="width:{100 * share:.1f}%"></span></div>'
        f"<dl>{facts}</dl></article>"
    )


def _change(now: float, then: float) -> str:
    percent = round(100 * (now / then - 1)) if then else 0
    sign = "&minus;" if percent < 0 else "+"
    return f' <span class="adafv-change">{sign}{abs(percent)} %</span>' if percent else ""


def _drawings(result: Result) -> str:
    name = escape(result.timing.name)
    figures = "".join(_figure(panel) for panel in result.panels)
    return (
        f'<section class="adafv-method" data-name="{name}"><h3>{name}: what was kept, and why</h3>'
        f"<div>{figures}</div></section>"
    )


def _figure(panel: Panel) -> str:
    images = "".join(
        f'<img src="{_as_data(image)}" width="{image.width}" height="{image.height}" '
        f'alt="{escape(": ".join(filter(None, (panel.title, panel.subtitle, label))))}">'
        for image, label in panel.drawings
    )
    return f"<figure>{images}<figcaption><b>{escape(panel.title)}</b> {escape(panel.subtitle)}</figcaption></figure>"


def _as_data(image: Image.Image) -> str:
    """The image inside its own address; some 30 kB."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
