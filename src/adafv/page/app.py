"""The page: what stands where, and what a click does."""

import asyncio
import hmac
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio
from gradio.data_classes import GradioModel
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware

from adafv.errors import AdaFVError
from adafv.evaluation.questions import BadRecordsError
from adafv.methods import Method, known_methods
from adafv.methods.options import listed
from adafv.page import checks as checking
from adafv.page.answers import MAX_ANSWER, METHODS, Answers, message
from adafv.page.checks import Check, Checks, Settings
from adafv.page.guard import FILE, VALUE, WORDS, Guard
from adafv.page.render import NOTHING_YET, problem_as_html, results_as_html, warning_as_html
from adafv.page.render_check import NO_CHECK_YET, bad_records_as_html, outcome_as_html, progress_as_html
from adafv.page.samples import Sample
from adafv.page.uploads import KEPT_SECONDS, MAX_ARCHIVE, MAX_BYTES, MEGABYTE, Uploads

MOST_WAITING = 64
"""Questions in the queue; whoever comes later is told so at once."""
_SIDE_BY_SIDE = 2
"""Questions on their way at once: one is answered, and one waits for its turn, but not for ever."""
_LOOKS = (0.2, 0.2, 0.4, 1.0)
"""Seconds between two looks at a check; the last one again and again."""

# On a narrow screen the results stand below the form, out of sight. The focus goes with the view, so that those who use
# the keyboard go on from there.
_SHOW = """name => {
    const part = document.getElementById(name), box = part.getBoundingClientRect();
    const visible = Math.min(box.bottom, innerHeight) - Math.max(box.top, 0);
    if (visible >= Math.min(box.height, 0.4 * innerHeight)) return;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    part.tabIndex = -1;
    part.focus({ preventScroll: true });
    part.scrollIntoView({ behavior: still ? "instant" : "smooth", block: name.endsWith("notice") ? "center" : "start" });
}"""
_SHOW_PROGRESS = f"""(...given) => {{
    if (given[0] && given[1]?.trim()) ({_SHOW})("results");
    return given.slice(0, 5);
}}"""
_SHOW_OUTCOME = f"""() => requestAnimationFrame(() => requestAnimationFrame(() =>
    ({_SHOW})(document.querySelector("#notice [role=alert]") ? "notice" : "results")
))"""
_SHOW_CHECK_BEGUN = f"""(...given) => {{
    if (given[0] && given[1]) ({_SHOW})("check-results");
    return given.slice(0, 9);
}}"""
_SHOW_CHECK = f"""() => requestAnimationFrame(() => requestAnimationFrame(() =>
    ({_SHOW})(document.querySelector("#check-notice [role=alert]") ? "check-notice" : "check-results")
))"""
_CATALOGUE = "Type an option behind a method, and press Enter: `adafv:objective=split`.\n\n"


@dataclass
class _Fields:
    """What stands on the first tab and says something, or is told something."""

    picture: Any
    gallery: Any
    """None where there are no samples."""
    question: Any
    keep: Any
    methods: Any
    longest: Any
    button: Any
    notice: Any
    results: Any = None


@dataclass
class _CheckFields:
    """The same of the second tab."""

    inputs: list[Any]
    """Questions, pictures, budgets, methods, loss, bad records, what is counted, suffix, longest answer."""
    button: Any
    stop: Any
    notice: Any
    results: Any = None


class _File(GradioModel):
    """What Gradio is to know of an uploaded file."""

    path: str


def build(answers: Answers, checks: Checks, about: str, samples: Sequence[Sample], options: str = "") -> Any:
    """The page as Gradio blocks.

    Args:
        about: who answers, as the end of a sentence.
        samples: to choose from.
        options: of the first method when the page opens, with colons between them.
    """
    with gradio.Blocks(title="adafv", analytics_enabled=False, delete_cache=(KEPT_SECONDS // 4, KEPT_SECONDS)) as page:
        gradio.HTML(
            f"<h1>adafv</h1><p>Keep the visual tokens that matter for the question. Questions are {escape(about)}.</p>",
            elem_id="title",
            js_on_load=None,
        )
        with gradio.Tabs(elem_id="tabs"):
            with gradio.Tab("Compare", id="compare"), gradio.Row():
                with gradio.Column(scale=2, min_width=300):
                    fields = _form(samples, options)
                with gradio.Column(scale=5, min_width=320):
                    fields.results = gradio.HTML(NOTHING_YET, elem_id="results", js_on_load=None, min_height=160)
            with gradio.Tab("Check", id="check"), gradio.Row():
                with gradio.Column(scale=2, min_width=300):
                    check_fields = _check_form()
                with gradio.Column(scale=5, min_width=320):
                    check_fields.results = gradio.HTML(
                        NO_CHECK_YET, elem_id="check-results", js_on_load=None, min_height=160
                    )
        _connect_pictures(fields, answers, samples)
        _connect_question(fields, answers)
        _connect_check(page, check_fields, checks)
    return page.queue(max_size=MOST_WAITING)


def _form(samples: Sequence[Sample], options: str) -> _Fields:
    """All that is filled in; below the button, what went wrong."""
    notice = gradio.HTML("", elem_id="notice", js_on_load=None, render=False)
    picture, gallery = _picture_fields(samples)
    question = gradio.Textbox(label="Question", placeholder="What is in the picture?", max_lines=4, elem_id="question")
    keep = gradio.Textbox(
        value="10%",
        label="Visual tokens to keep",
        info="A share (10%), a number (64), or all; several with commas.",
        max_lines=1,
        elem_id="keep",
    )
    first, *others = METHODS
    methods = _methods_field([":".join(filter(None, (first, options))), *others], "methods")
    button = gradio.Button("Ask", variant="primary", elem_id="ask")
    notice.render()
    with gradio.Accordion("More", open=False):
        longest = gradio.Slider(1, MAX_ANSWER, value=32, step=1, label="Longest answer, in tokens", elem_id="longest")
        gradio.Markdown(_CATALOGUE + "\n".join(map(_described, known_methods().values())))
    return _Fields(picture, gallery, question, keep, methods, longest, button, notice)


def _methods_field(value: list[str], name: str) -> Any:
    return gradio.Dropdown(
        list(known_methods()), value=value, multiselect=True, allow_custom_value=True, label="Methods", elem_id=name
    )


def _check_form() -> _CheckFields:
    questions = gradio.File(
        label=f"Questions (.jsonl or .csv, {checking.MAX_FILE // MEGABYTE} MB at most)",
        file_types=[".jsonl", ".csv"],
        height=116,
        elem_id="check-questions",
    )
    pictures = gradio.File(
        label=f"Their pictures (.zip, {MAX_ARCHIVE // MEGABYTE} MB at most)",
        file_types=[".zip"],
        height=116,
        elem_id="check-pictures",
    )
    # Gradio would fail on a file of which nothing but a path is known, which is all that the guard lets pass.
    questions.data_model = pictures.data_model = _File
    keep = gradio.Textbox(
        value=checking.KEEP,
        label="Budgets to try",
        info="Shares (10%) or numbers (64) of visual tokens.",
        max_lines=1,
        elem_id="check-keep",
    )
    methods = _methods_field(list(checking.METHODS), "check-methods")
    loss = gradio.Number(
        value=1, minimum=0.01, maximum=99, label="Points (of 100) that must not be lost", elem_id="check-loss"
    )
    bad = gradio.Radio(
        [("end the check", "refuse"), ("are left out", "skip")],
        value="refuse",
        label="Records that cannot be used",
        elem_id="check-bad",
    )
    with gradio.Row():
        button = gradio.Button("Check", variant="primary", elem_id="check", min_width=120)
        stop = gradio.Button("Stop", interactive=False, elem_id="check-stop", min_width=80)
    notice = gradio.HTML("", elem_id="check-notice", js_on_load=None)
    with gradio.Accordion("More", open=False):
        by = gradio.Radio(
            [("accuracy, where answers are given", "auto"), ("agreement with unpruned", "agreement")],
            value="auto",
            label="What is counted",
            elem_id="check-by",
        )
        suffix = gradio.Textbox(
            label="Put behind every question",
            placeholder=" Answer with one word.",
            max_lines=1,
            elem_id="check-suffix",
        )
        longest = gradio.Slider(
            1, MAX_ANSWER, value=32, step=1, label="Longest answer, in tokens", elem_id="check-longest"
        )
    inputs = [questions, pictures, keep, methods, loss, bad, by, suffix, longest]
    return _CheckFields(inputs, button, stop, notice)


def _picture_fields(samples: Sequence[Sample]) -> tuple[Any, Any]:
    """(where a picture is put, what one is chosen from; None without samples)."""
    picture = gradio.Image(
        label=f"Picture ({MAX_BYTES // MEGABYTE} MB at most)",
        type="filepath",
        sources=["upload", "clipboard"],
        height=260,
        buttons=[],
        alt_text="The picture that is asked about",
        elem_id="picture",
    )
    if not samples:
        return picture, None
    # Not gradio.Examples: its thumbnails have no name that a screen reader could say.
    gallery = gradio.Gallery(
        [(str(sample.path), sample.path.stem) for sample in samples],
        label="Or choose one",
        columns=6,
        height="auto",
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="gallery",
    )
    return picture, gallery


def _connect_pictures(fields: _Fields, answers: Answers, samples: Sequence[Sample]) -> None:
    """A sample that is clicked, and a picture that is uploaded."""

    def check(payload: Any) -> tuple[Any, Any]:
        """Tell at once whether an uploaded picture is one; else take it away again.

        Whoever was quick has asked already, so the answer to that is left alone where all is well.
        """
        try:
            path = _path(payload)
            if path is not None:
                answers.check_picture(path)
        except Exception as error:
            return None, _problem(error)
        return gradio.skip(), gradio.skip()

    def choose(event: gradio.EventData) -> tuple[Any, Any, str]:
        """Take a sample with its question; one without a question leaves the user's own.

        Of the event only the number counts: the path in it is whatever the sender wrote.
        """
        try:
            number = event.index
        except (AttributeError, TypeError):
            number = None
        if type(number) is not int or not 0 <= number < len(samples):
            return gradio.skip(), gradio.skip(), _problem(AdaFVError("there is no such picture; choose another one"))
        path = fields.gallery.value[number]["image"]["path"]
        return path, samples[number].question or gradio.skip(), ""

    picture, notice = fields.picture, fields.notice
    if fields.gallery is not None:
        outcome = [picture, fields.question, notice]
        fields.gallery.select(choose, None, outcome, api_visibility="private", show_progress="hidden")
    # What was said of the last picture goes at once, without the server.
    picture.upload(None, None, notice, js="() => ''", api_visibility="private", show_progress="hidden")
    # Not preprocessed: Gradio would open the picture itself, and fail without a message where it is none. Nor does it
    # look where the path leads, unless the sender asks for it; `answers` does.
    picture.upload(
        check,
        picture,
        [picture, notice],
        preprocess=False,
        api_visibility="private",
        show_progress="hidden",
    )


def _connect_question(fields: _Fields, answers: Answers) -> None:
    """Asking, by the button or from a field."""

    def ask(picture: Any, question: Any, keep: Any, methods: Any, longest: Any) -> tuple[str, str]:
        try:
            compared = answers.compare(_path(picture), question, keep, methods, longest)
            return results_as_html(compared.results), warning_as_html(compared.warning)
        except Exception as error:
            return NOTHING_YET, _problem(error)

    asked = gradio.on(
        [fields.button.click, fields.question.submit, fields.keep.submit],
        ask,
        [fields.picture, fields.question, fields.keep, fields.methods, fields.longest],
        [fields.results, fields.notice],
        preprocess=False,
        api_name="ask",
        show_progress="full",
        concurrency_limit=_SIDE_BY_SIDE,
        js=_SHOW_PROGRESS,
    )
    asked.then(None, None, None, js=_SHOW_OUTCOME, api_visibility="private")


def _connect_check(page: Any, fields: _CheckFields, checks: Checks) -> None:
    """Checking, stopping, and leaving the page."""

    async def check(
        request: gradio.Request, questions: Any, pictures: Any, *settings: Any
    ) -> AsyncIterator[tuple[Any, str, Any]]:
        """Begin, and show how far it is until it ends. What is not looked at for a while ends by itself."""
        visitor = _visitor(request)
        try:
            wished = Settings.of(*settings)
            begun = await run_in_threadpool(checks.begin, visitor, _path(questions), _path(pictures), wished)
        except Exception as error:
            yield NO_CHECK_YET, _problem(error), gradio.update(interactive=False)
            return
        looks = 0
        while not begun.ended:
            begun.look()
            yield progress_as_html(begun, checks.ahead_of(begun)), "", gradio.update(interactive=True)
            await asyncio.sleep(_LOOKS[min(looks, len(_LOOKS) - 1)])
            looks += 1
        yield *_shown_outcome(begun), gradio.update(interactive=False)

    def stop(request: gradio.Request) -> None:
        checks.stop(_visitor(request))

    checked = fields.button.click(
        check,
        fields.inputs,
        [fields.results, fields.notice, fields.stop],
        preprocess=False,
        api_visibility="private",
        show_progress="hidden",
        concurrency_limit=checking.MOST_WAITING + 2,  # one works, and one is told that there are too many
        trigger_mode="once",
        js=_SHOW_CHECK_BEGUN,
    )
    checked.then(None, None, None, js=_SHOW_CHECK, api_visibility="private")
    fields.stop.click(stop, None, None, api_visibility="private", show_progress="hidden", concurrency_limit=4)
    page.unload(stop)


def _visitor(request: Any) -> str:
    """A tab of a browser."""
    return str(request.session_hash)


def _shown_outcome(check: Check) -> tuple[str, str]:
    """Results, and what went wrong."""
    if check.error is not None:
        return NO_CHECK_YET, _problem(check.error)
    if check.result is None:
        return NO_CHECK_YET, warning_as_html("Stopped. What was answered is deleted.")
    return outcome_as_html(check), ""


def _described(method: type[Method]) -> str:
    options = "".join(f"\n    - `{option}`: {escape(meaning)}" for option, meaning in listed(method))
    return f"- **{method.name}**: {escape(method.summary)}{options}"


def _path(payload: Any) -> Any:
    """Where the picture lies that the browser speaks of; it may be anything but is checked by whoever opens it."""
    return payload.get("path") if isinstance(payload, dict) else payload


def _problem(error: Exception) -> str:
    """Show a message for a while where it cannot be missed, and return it to be shown for good."""
    text = message(error)
    gradio.Warning(escape(text), title="")
    return problem_as_html(text) + (bad_records_as_html(error.bad) if isinstance(error, BadRecordsError) else "")


def serve(page: Any, uploads: Uploads, host: str, port: int, password: str, ready: Callable[[], None]) -> None:
    """Serve the page until interrupted; nothing is fetched from elsewhere, and nothing is sent there.

    Args:
        uploads: the folder that Gradio keeps uploads in.
        host: a name or an address; one of IPv6 without brackets.
        password: asked of everyone, with any user name; empty to let everyone in.
        ready: called once the page can be opened.

    Raises:
        OSError: the port is taken.
    """
    # Gradio asks its own server whether it is up; a proxy for the outside world must not get in between.
    bypass = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (bypass, "127.0.0.1", "localhost", host)))
    # Gradio keeps the functions of the page by number; those without `fn` run in the browser alone.
    functions = {
        number: [_kind(part) for part in function.inputs]
        for number, function in page.fns.items()
        if function.fn is not None
    }
    (ask,) = (number for number in functions if page.fns[number].api_name == "ask")
    page.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_ARCHIVE,
        auth=(lambda _, given: _same(given, password)) if password else None,
        auth_message="Any user name will do; the password is that of whoever runs this page." if password else None,
        app_kwargs={"middleware": [Middleware(Guard, uploads=uploads, functions=functions, ask=ask)]},
        state_session_capacity=4 * MOST_WAITING,  # anybody may begin any number, and each is kept in memory
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        theme=_theme(),
        css_paths=Path(__file__).with_name("style.css"),
    )
    try:
        ready()
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)


def _kind(part: Any) -> str:
    """What the guard lets pass for a component."""
    if isinstance(part, (gradio.Image, gradio.File)):
        return FILE
    return WORDS if isinstance(part, gradio.Dropdown) and part.multiselect else VALUE


def _same(given: str, password: str) -> bool:
    """Compared in a time that does not tell how much of it was right."""
    return hmac.compare_digest(given.encode(errors="surrogatepass"), password.encode(errors="surrogatepass"))


def _theme() -> Any:
    # Fonts by name alone are those of the user's own system; Gradio's default would be fetched.
    theme = gradio.themes.Default(
        primary_hue="amber",
        neutral_hue="slate",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    # Gradio's own are too pale to be read by everyone.
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )
