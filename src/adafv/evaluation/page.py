"""The result as one HTML file: nothing is fetched, no script runs, and everything that came from elsewhere is escaped."""

import base64
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from PIL import Image

from adafv.errors import AdaFVError
from adafv.evaluation import words
from adafv.printable import printable

if TYPE_CHECKING:
    from adafv.evaluation.answers import Asker
    from adafv.evaluation.check import Counted

PICTURE_WIDTH = 300
"""Pixels of a picture with its kept tokens."""
MAX_PICTURE_BYTES = 60_000
"""Of such a picture as JPEG; what is larger is compressed more."""
_LONGEST = 600
"""Characters of a question or an answer that are shown."""
_SERIES = 8
"""Colours that there are for methods."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 54


def page(result: Mapping[str, Any], pictures: Sequence[Image.Image | None]) -> str:
    """The whole file.

    Args:
        pictures: of each of the result's cases, the picture with its kept tokens; None where it could not be drawn.
    """
    style = (files("adafv.evaluation") / "check.css").read_text(encoding="utf-8")
    title = f"Is it safe to prune? {_text(result['model']['name'])} on {_text(result['questions']['source'])}"
    body = [
        f"<header><h1>Is it safe to prune?</h1><p>{_text(words.summary(result))}.</p></header>",
        _verdicts(result),
        _charts(result),
        _table(result),
        _kinds(result),
        _cases(result, pictures),
        _small_print(result),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def drawn_cases(asker: "Asker", counted: "Counted", result: Mapping[str, Any]) -> Iterator[Image.Image | None]:
    """Of each of the result's cases the picture with its kept tokens; None where it cannot be drawn. One call of the model
    each, as they are taken."""
    from adafv.picture import panels  # torch, which the rest here does without

    questions = {each.name: each for each in counted.questions}
    ways = {(way.name, str(way.budget)): way for way in counted.ways}
    for case in result["cases"]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the page says where no word counted
                record, crops = asker.record(questions[case["question"]], ways[case["method"], case["keep"]])
            drawn = panels(record, 0, crops, width=PICTURE_WIDTH)[0].drawings[-1][0]
        except (AdaFVError, OSError):  # of a picture that is gone by now
            yield None
        else:
            yield drawn


def _text(value: object) -> str:
    """Fit to be shown: no control characters, not too long, escaped."""
    text = str(value)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 3]}..."
    return escape(printable(text, kept="\n"))


def _verdicts(result: Mapping[str, Any]) -> str:
    cards = []
    for number, verdict in enumerate(result["verdicts"]):
        kind = "safe" if verdict["safe"] is not None else "open"
        headline = words.headline(result, verdict)
        headline = headline[0].upper() + headline[1:]
        cards.append(
            f'<article class="verdict {kind}"><h3><span class="dot s{number % _SERIES}"></span>{_text(verdict["method"])}'
            f"</h3><p class=big>{_text(headline)}</p><p>{_text(words.explanation(result, verdict))}</p></article>"
        )
    return f'<section class="verdicts">{"".join(cards)}</section>'


def _charts(result: Mapping[str, Any]) -> str:
    figures = []
    if result["questions"]["with_answers"]:
        figures.append(_chart(result, "accuracy", "Right answers, %"))
    figures.append(_chart(result, "agreement", "Same answer as unpruned, %"))
    names = list(dict.fromkeys(row["method"] for row in result["rows"]))
    legend = "".join(
        f'<li><span class="dot s{number % _SERIES}"></span>{_text(name)}</li>' for number, name in enumerate(names)
    )
    note = (
        "Bars: 95 % intervals. Filled: shown to be safe. Dashed: what may be lost. The horizontal scale is logarithmic."
    )
    charts = f'<ul class="legend">{legend}</ul><div class="charts">{"".join(figures)}</div>'
    return _section("What stays, by budget", charts, _note(note))


def _chart(result: Mapping[str, Any], measure: str, title: str) -> str:
    rows = result["rows"]
    full = 1.0 if measure == "agreement" else result["unpruned"]["accuracy"]["mean"]
    blank = result["blank"]
    estimates = [row[measure] for row in rows]
    lowest = min([each["low"] for each in estimates] + [full])
    highest = max([each["high"] for each in estimates] + [full])
    bottom, top = max(0.0, math.floor(lowest * 20) / 20), min(1.0, math.ceil(highest * 20) / 20)
    smallest = min(row["share"] for row in rows)

    def across(share: float) -> float:
        low = math.log(smallest) - 0.15
        part = (math.log(max(share, smallest)) - low) / -low if low < 0 else 1.0
        return round(_LEFT + part * (_WIDTH - _LEFT - _RIGHT), 1)

    def down(value: float) -> float:
        return round(_TOP + (top - value) / max(top - bottom, 1e-9) * (_HEIGHT - _TOP - _BOTTOM), 1)

    drawn = [f"<title>{escape(title)}</title>"]
    step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.25) if (top - bottom) / step <= 7)
    tick = math.ceil(bottom / step - 1e-9) * step
    while tick <= top + 1e-9:
        y = down(tick)
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{100 * tick:g}</text>')
        tick = round(tick + step, 9)
    drawn.extend(_marks(rows, across))
    drawn.append(f'<line class="full" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(full)}" y2="{down(full)}"/>')
    if result["settings"]["counted"] == measure:
        limit = full - result["settings"]["max_loss"]
        if limit >= bottom:
            drawn.append(
                f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(limit)}" y2="{down(limit)}"/>'
            )
    if blank is not None:
        # Mostly far below; drawn where it is not, as then the questions say little.
        without = blank[measure]["mean"]
        y = down(max(without, bottom))
        if without >= bottom:
            drawn.append(f'<line class="blank" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        label = f"picture blanked: {words.percent(without)} %"
        drawn.append(f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{y - 6}" text-anchor="end">{label}</text>')
    names = list(dict.fromkeys(row["method"] for row in rows))
    for number, name in enumerate(names):
        mine = [row for row in rows if row["method"] == name]
        # Side by side, so that bars do not cover each other.
        aside = (number - (len(names) - 1) / 2) * 4
        places = [(round(across(row["share"]) + aside, 1), down(row[measure]["mean"]), row) for row in mine]
        line = " ".join(f"{x},{y}" for x, y, _ in places)
        drawn.append(f'<g class="series s{number % _SERIES}"><polyline points="{line}"/>')
        for x, y, row in places:
            drawn.append(
                f'<line x1="{x}" x2="{x}" y1="{down(row[measure]["low"])}" y2="{down(row[measure]["high"])}"/>'
            )
            tested = result["settings"]["counted"] == measure and row["test"] is not None
            passed = tested and row["test"]["passed"]
            verdict = words.shown(row, result["settings"]["max_loss"])
            label = f"{row['method']}, keep {row['keep']}: {words.percent(row[measure]['mean'])} %, {verdict}"
            drawn.append(f'<circle class="{"safe" if passed else "open"}" cx="{x}" cy="{y}" r="5">')
            drawn.append(f"<title>{_text(label)}</title></circle>")
        drawn.append("</g>")
    x = (_LEFT + _WIDTH - _RIGHT) / 2
    drawn.append(
        f'<text class="label" x="{x}" y="{_HEIGHT - 4}" text-anchor="middle">visual tokens that stay, %</text>'
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)} by budget; the table below has the numbers">{"".join(drawn)}</svg></figure>'
    )


def _marks(rows: Sequence[Mapping[str, Any]], across: Any) -> list[str]:
    """Of the horizontal axis: the shares that were asked for, as far as they do not touch."""
    drawn, last = [], math.inf
    for share in [1.0, *sorted({row["share"] for row in rows}, reverse=True)]:
        x = across(share)
        if last - x >= 40:
            anchor = "end" if share == 1.0 else "middle"
            label = f"{100 * share:.2g}" if share < 0.995 else "100"
            drawn.append(
                f'<text class="tick" x="{x}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="{anchor}">{label}</text>'
            )
            last = x
    return drawn


def _table(result: Mapping[str, Any]) -> str:
    headings = words.headings(result)
    names = list(dict.fromkeys(row["method"] for row in result["rows"]))
    rows = []
    for cells in words.cells(result, intervals=True):
        *first, verdict = cells
        line = "".join(
            _cell(heading, _text(cell))
            if number
            else f'<th scope="row" class="{_series(names, cell)}">{_text(cell)}</th>'
            for number, (heading, cell) in enumerate(zip(headings, first, strict=False))
        )
        tag = f'<span class="tag {verdict.replace(" ", "-")}">{_text(verdict)}</span>' if verdict else ""
        rows.append(f"<tr>{line}{_cell('verdict', tag)}</tr>")
    note = "Lost: mean and 95 % interval. At most: the one-sided bound that is tested."
    return _section("Numbers", _wide(headings, rows, "stack"), _note(note))


def _kinds(result: Mapping[str, Any]) -> str:
    kinds = words.kinds_of(result["rows"])[:20]
    if len(kinds) < 2:
        return ""
    answered = result["questions"]["with_answers"]
    counts = "".join(f"<td>{result['rows'][0]['kinds'][kind]['questions']}</td>" for kind in kinds)
    rows = [f'<tr><th scope="row">questions</th>{counts}</tr>']
    for row in result["rows"]:
        cells = []
        for kind in kinds:
            found = row["kinds"][kind]
            cells.append(words.percent(found["loss"], "+") if answered else words.percent(1 - found["agreement"]))
        line = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{_text(row["method"])}, {_text(row["keep"])}</th>{line}</tr>')
    what = "Points of accuracy lost" if answered else "Answers changed, %"
    note = "Few questions of a kind say little; no claims are made here."
    table = _wide(["", *kinds], rows, "kinds")
    if len(rows) > 8:
        table = f"<details><summary>{len(rows) - 1} rows</summary>{table}</details>"
    return _section(f"{what}, by kind of question", table, _note(note))


def _series(names: Sequence[str], name: str) -> str:
    """The colour of a method, where there are several."""
    return f"s{names.index(name) % _SERIES}" if len(names) > 1 and name in names else ""


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{''.join(parts)}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _cell(heading: str, inside: str) -> str:
    """Of a table that stands below each other on a phone, where every cell says what it is."""
    kind = "" if inside else ' class="empty"'
    return f'<td data-label="{_text(heading)}"{kind}>{inside}</td>'


def _wide(headings: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in headings)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


_CHANGES = {"lost": "right before, wrong now", "gained": "wrong before, right now", "other": "another answer"}


def _cases(result: Mapping[str, Any], pictures: Sequence[Image.Image | None]) -> str:
    cases = result["cases"]
    if not cases:
        return "<section><h2>What changed</h2><p>No answer changed at any budget.</p></section>"
    note = (
        f"{len(cases)} of the questions whose answer changed, each at the most tokens at which it did. Bright: the tokens "
        "that stayed."
    )
    cards = "".join(_case(case, picture) for case, picture in zip(cases, pictures, strict=True))
    return _section("What changed", _note(note), f'<div class="cases">{cards}</div>')


def _case(case: Mapping[str, Any], picture: Image.Image | None) -> str:
    change = _CHANGES[case["change"]]
    alternative = f"{case['picture']}: what stays at {case['keep']} by {case['method']}"
    image = (
        '<p class="no-picture">not drawn</p>'
        if picture is None
        else f'<img src="{_data_url(picture)}" width="{picture.width}" height="{picture.height}" '
        f'alt="{_text(alternative)}">'
    )
    others = "".join(f"<li>{_text(each['method'])}, {_text(each['keep'])}: {_said(each)}</li>" for each in case["all"])
    right = "" if case["answers"] is None else f"<dt>right</dt><dd>{_text(', '.join(case['answers']))}</dd>"
    place = f"{_text(case['picture'])}, {_text(case['question'])}"
    return (
        f'<article class="case {case["change"]}">{image}<p class="question">{_text(case["text"])}</p><dl>{right}'
        f"<dt>unpruned</dt><dd>{_said(case['unpruned'])}</dd>"
        f"<dt>{_text(case['method'])}, {_text(case['keep'])}</dt><dd>{_said(case['pruned'])}</dd></dl>"
        f'<p class="note"><span class="tag {case["change"]}">{change}</span> {place}</p>'
        f"<details><summary>all budgets</summary><ul>{others}</ul></details></article>"
    )


def _said(given: Mapping[str, Any]) -> str:
    return (_text(given["answer"]) or "<i>nothing</i>") + _mark(given["right"])


def _mark(right: float | None) -> str:
    if right is None:
        return ""
    if right in (0.0, 1.0):
        return ' <span class="yes">&#10003; right</span>' if right else ' <span class="no">&#10007; wrong</span>'
    return f' <span class="partly">{100 * right:.0f} % right</span>'


def _data_url(picture: Image.Image) -> str:
    for quality in (80, 60, 40, 20):
        data = io.BytesIO()
        picture.convert("RGB").save(data, "JPEG", quality=quality)
        if data.tell() <= MAX_PICTURE_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"


def _small_print(result: Mapping[str, Any]) -> str:
    model, settings = result["model"], result["settings"]
    said = "".join(f"<li>{_text(sentence)}</li>" for sentence in words.how(result))
    facts = {
        "model": f"{model['name']} ({model['model']}), {model['precision']}",
        "versions": ", ".join(f"{name} {version}" for name, version in model["versions"].items()),
        "questions": result["questions"]["source"],
        "what is right": settings["matching"],
        "seed": settings["seed"],
    }
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    bad = result["questions"]["left_out"]
    left_out = ""
    if bad:
        lines = "".join(f"<li>{_text(each['where'])}: {_text(each['problem'])}</li>" for each in bad[:50])
        more = f"<li>and {len(bad) - 50} more, in the JSON file</li>" if len(bad) > 50 else ""
        left_out = f"<h3>Left out</h3><ul>{lines}{more}</ul>"
    inside = f'<ul>{said}</ul><dl class="facts">{listed}</dl>{left_out}'
    return f'<section class="small"><h2>How this was measured</h2>{inside}</section>'
