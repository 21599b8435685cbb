"""What a result says, in sentences and as a table on the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def percent(value: float, sign: str = "") -> str:
    """A share as percent with one digit; no minus in front of zero."""
    number = round(100 * value, 1) + 0.0
    return f"{number:{sign if number else ''}.1f}"


def points(value: float) -> str:
    """A share in points: "1 point", "0.5 points"."""
    number = f"{round(100 * value, 2):g}"
    return f"{number} point" if number == "1" else f"{number} points"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, about."""
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def counted(result: Mapping[str, Any]) -> str:
    """What is lost, as a word."""
    what = result["settings"]["counted"]
    return "accuracy" if what == "accuracy" else "agreement with the unpruned model"


def summary(result: Mapping[str, Any]) -> str:
    """What was asked of whom, in one sentence."""
    asked, model = result["questions"], result["model"]["name"]
    pictures = f"{asked['pictures']:,} picture{'s' * (asked['pictures'] != 1)}"
    text = f"{asked['count']:,} question{'s' * (asked['count'] != 1)} on {pictures}, asked of {model}"
    if asked["left_out"]:
        text += f"; {len(asked['left_out'])} left out"
    return text


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """One or two sentences per method: the smallest budget that is safe, and what would tell more."""
    return [f"{verdict['method']}: {_verdict(result, verdict)}" for verdict in result["verdicts"]]


def headline(result: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    """The verdict on a method in a few words."""
    if verdict["safe"] is None:
        return "no budget is shown to be safe yet"
    return (
        f"keep {verdict['safe']} ({_tokens(verdict['safe_tokens'])} of {_tokens(result['unpruned']['tokens'])} tokens)"
    )


def explanation(result: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    """The rest of the verdict: what is claimed, and what is not."""
    settings = result["settings"]
    sure = f"{percent(settings['confidence']).removesuffix('.0')} % confidence"
    parts = []
    if verdict["safe"] is not None:
        parts.append(f"It loses less than {points(settings['max_loss'])} of {counted(result)}, with {sure}.")
    budget = verdict["first_not_shown"]
    if budget is not None:
        row = row_of(result, verdict["method"], budget)
        lost, more = row["loss"]["mean"], verdict["more_questions"]
        if verdict["shown_unsafe"]:
            parts.append(f"{budget} {_lost(lost)} here: it is not safe for questions like these.")
        elif more is None:
            parts.append(f"{budget} {_lost(lost)} here, which does not say enough.")
        else:
            why = "on too few questions to be sure" if lost < settings["max_loss"] else "which may be chance"
            parts.append(
                f"{budget} {_lost(lost)} here, {why}: about {more:,} more like these would tell, if they go as these did."
            )
    return " ".join(parts)


def _verdict(result: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    return f"{headline(result, verdict)}. {explanation(result, verdict)}"


def _lost(loss: float) -> str:
    if loss > 0:
        return f"lost {points(loss)}"
    return f"gained {points(-loss)}" if loss < 0 else "lost nothing"


def _tokens(number: float) -> str:
    return f"{round(number):,}"


def how(result: Mapping[str, Any]) -> list[str]:
    """How the claims were made, for the small print."""
    settings, methods = result["settings"], len(result["verdicts"])
    confidence = f"{percent(settings['confidence']).removesuffix('.0')} %"
    test = (
        f"Is the loss below {points(settings['max_loss'])}? Budgets are tested one-sided, from the most tokens to the "
        "fewest, up to the first that fails; so looking at several does not raise the chance of a wrong claim."
    )
    said = [test, "Differences are paired, question by question, and intervals count pictures."]
    if methods > 1:
        share = percent((1 - settings["confidence"]) / methods)
        said.append(
            f"{methods} methods share the chance of a wrong claim (Holm): each starts with {share} %, so all claims hold "
            f"together with {confidence} confidence."
        )
    blank = result["blank"]
    if blank is not None and settings["counted"] == "accuracy":
        full, without = result["unpruned"]["accuracy"]["mean"], blank["accuracy"]["mean"]
        said.append(f"With its picture blanked the model gets {percent(without)} % right, unpruned {percent(full)} %.")
    elif blank is not None:
        said.append(
            f"With its picture blanked the model gives the same answer to {percent(blank['agreement']['mean'])} %."
        )
    said += cautions(result)
    textless = max((row["chosen_without_text"] for row in result["rows"]), default=0)
    if textless:
        said.append(f"In {textless} questions no word counts for the picture, and saliency alone chose the tokens.")
    return said


def cautions(result: Mapping[str, Any]) -> list[str]:
    """Why these questions cannot tell what pruning loses, whatever the verdicts say; mostly empty."""
    blank, unpruned = result["blank"], result["unpruned"]
    if result["settings"]["counted"] == "accuracy":
        full = unpruned["accuracy"]["mean"]
        if full == 0:
            return ["The unpruned model gets no question right: look at the answers, --suffix and --matching."]
        needless = blank is not None and blank["accuracy"]["mean"] >= full - 0.05
    else:
        needless = blank is not None and blank["agreement"]["mean"] >= 0.9
    return ["These questions hardly need the picture, and cannot tell what pruning loses."] if needless else []


def row_of(result: Mapping[str, Any], method: str, keep: str) -> dict[str, Any]:
    """The row of a method at a budget."""
    found: dict[str, Any] = next(row for row in result["rows"] if (row["method"], row["keep"]) == (method, keep))
    return found


def shown(row: Mapping[str, Any], max_loss: float) -> str:
    """What is known of a row, in a word or two."""
    if row["test"] is not None and row["test"]["passed"]:
        return "safe"
    if row["loss"]["low"] > max_loss:
        return "loses more"
    return "not tested" if row["test"] is None else "not shown"


def headings(result: Mapping[str, Any]) -> list[str]:
    """Of the table."""
    answered = result["questions"]["with_answers"]
    loss = "lost" if result["settings"]["counted"] == "accuracy" else "changed"
    return [
        "method",
        "keep",
        "tokens",
        *(["right, %"] if answered else []),
        "same, %",
        loss,
        "at most",
        "verdict",
    ]


def cells(result: Mapping[str, Any], *, intervals: bool = False) -> list[list[str]]:
    """Of the table: unpruned, blanked, then each method at each budget."""
    answered = result["questions"]["with_answers"]
    unpruned, blank = result["unpruned"], result["blank"]

    def mean(estimate: Mapping[str, float] | None) -> str:
        return "" if estimate is None else percent(estimate["mean"])

    right = [mean(unpruned["accuracy"])] if answered else []
    table = [["unpruned", "all", _tokens(unpruned["tokens"]), *right, "", "", "", ""]]
    if blank is not None:
        right = [mean(blank["accuracy"])] if answered else []
        table.append(["blanked", "", "", *right, mean(blank["agreement"]), "", "", ""])
    for row in result["rows"]:
        loss = row["loss"]
        lost = percent(loss["mean"], "+")
        if intervals:
            lost = f"{lost} ({percent(loss['low'], '+')} to {percent(loss['high'], '+')})"
        right = [mean(row["accuracy"])] if answered else []
        bound = percent(row["loss_bound"]["at_most"], "+")
        table.append(
            [
                row["method"],
                row["keep"],
                _tokens(row["tokens"]),
                *right,
                mean(row["agreement"]),
                lost,
                bound,
                shown(row, result["settings"]["max_loss"]),
            ]
        )
    return table


def terminal_table(result: Mapping[str, Any]) -> "Table":
    """The table for rich; what comes from elsewhere is plain text."""
    from rich.table import Table
    from rich.text import Text

    from adafv.printable import printable

    made = Table(
        title=Text(printable(summary(result))),
        caption="at most: the one-sided bound of what is lost, which is tested",
        title_style="",
    )
    for heading in headings(result):
        made.add_column(
            heading, justify="left" if heading in ("method", "verdict") else "right", no_wrap=heading == "verdict"
        )
    styles = {"safe": "green", "not shown": "yellow", "loses more": "red"}
    for row in cells(result):
        made.add_row(*(Text(printable(cell), style=styles.get(cell, "")) for cell in row))
    return made


def kinds_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds of questions that there are."""
    return sorted({kind for row in rows for kind in row["kinds"]})
