"""A check as HTML, while it works and when it has ended. Whatever a user or a model wrote is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from adafv.evaluation import words
from adafv.evaluation.questions import BadRecord
from adafv.page.checks import REPORT, RESULT, Check
from adafv.printable import printable

_MOST_LISTED = 20
"""Bad records."""
_EXAMPLE = (
    '{"image": "kitchen.jpg", "question": "How many cups are there?", "answer": "three"}\n'
    '{"image": "street.jpg", "question": "Is there a bicycle?", "answer": "no"}'
)
NO_CHECK_YET = (
    '<div class="adafv-nothing-yet"><p>What pruning loses on your own questions will stand here, and the smallest budget '
    "that is safe.</p><p>One question a line:</p>"
    f"<pre>{escape(_EXAMPLE)}</pre>"
    "<p>Without answers, it is counted how often an answer stays what it was.</p></div>"
)


def progress_as_html(check: Check, ahead: int) -> str:
    """How far it is.

    Args:
        ahead: checks that come first.
    """
    bar = ""
    if check.phase == "waiting":
        said = f"{ahead} check{'s' * (ahead != 1)} before yours." if ahead else "It begins in a moment."
    elif check.phase == "asking":
        left = "" if check.left is None else f", about {words.duration(check.left)} left"
        said = f"{check.done:,} of {check.total:,} answers{left}."
        bar = f'<progress class="adafv-bar" aria-label="Answers" max="{check.total}" value="{check.done}"></progress>'
    else:
        said = "All answers are given; the report is being made."
        bar = '<progress class="adafv-bar" aria-label="The report"></progress>'
    return (
        f'<div class="adafv-card adafv-progress"><h3>{_text(check.source)}</h3><p>{said}</p>{bar}'
        '<p class="adafv-small">Questions of the other tab are answered in between. Closing the page ends the check.</p>'
        "</div>"
    )


def outcome_as_html(check: Check) -> str:
    """What came of it: verdicts, numbers, and where the report lies."""
    result = check.result
    assert result is not None
    assert check.report is not None
    cautions = "".join(f'<p class="adafv-warning" role="status">{_text(each)}</p>' for each in words.cautions(result))
    verdicts = "".join(_verdict(result, verdict) for verdict in result["verdicts"])
    left_out = [BadRecord(each["where"], each["problem"]) for each in result["questions"]["left_out"]]
    return (
        f'<p class="adafv-small" role="status">{_text(words.summary(result))}.</p>{cautions}'
        f'<div class="adafv-cards">{verdicts}</div>'
        f'<p class="adafv-files">{_link(check, REPORT, "Report (HTML)")}{_link(check, RESULT, "Result (JSON)")}'
        '<span class="adafv-small">Kept for an hour. The report has curves, and the answers that changed.</span></p>'
        f"{_table(result)}"
        + (f'<h3 class="adafv-heading">Left out</h3>{bad_records_as_html(left_out)}' if left_out else "")
    )


def bad_records_as_html(bad: Sequence[BadRecord]) -> str:
    """Records that cannot be used, by line."""
    more = f"<li>and {len(bad) - _MOST_LISTED:,} more</li>" if len(bad) > _MOST_LISTED else ""
    listed = "".join(f"<li>{_text(each)}</li>" for each in bad[:_MOST_LISTED])
    return f'<ul class="adafv-records">{listed}{more}</ul>'


def _verdict(result: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    headline = words.headline(result, verdict)
    kind = "adafv-safe" if verdict["safe"] is not None else "adafv-open"
    return (
        f'<article class="adafv-card adafv-verdict {kind}" data-name="{_text(verdict["method"])}">'
        f'<h3>{_text(verdict["method"])}</h3><p class="adafv-answer">{_text(headline[:1].upper() + headline[1:])}</p>'
        f"<p>{_text(words.explanation(result, verdict))}</p></article>"
    )


def _link(check: Check, name: str, said: str) -> str:
    path = quote(str(check.report / name)) if check.report is not None else ""
    # Relative, so that it leads there behind a proxy, too.
    return f'<a class="adafv-file" href="gradio_api/file={path}" download="adafv-{name}">{said}</a>'


def _table(result: Mapping[str, Any]) -> str:
    headings = words.headings(result)
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in headings)
    rows = []
    for cells in words.cells(result):
        first, *others = cells
        line = "".join(
            f'<td data-label="{_text(heading)}">{_tag(cell) if heading == "verdict" else _text(cell)}</td>'
            for heading, cell in zip(headings[1:], others, strict=True)
        )
        rows.append(f'<tr><th scope="row">{_text(first)}</th>{line}</tr>')
    return (
        f'<div class="adafv-wide"><table class="adafv-table"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="adafv-small">Lost: points, of 100. At most: the one-sided '
        "bound that is tested.</p>"
    )


def _tag(verdict: str) -> str:
    return f'<span class="adafv-tag adafv-{verdict.replace(" ", "-")}">{_text(verdict)}</span>' if verdict else ""


def _text(value: object) -> str:
    return escape(printable(str(value), kept="\n"))
