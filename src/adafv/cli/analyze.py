"""`adafv analyze`: whether a model's scores know where things are; figures 2 to 4 of the paper."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adafv.asking.failures import UsageError, check_text
from adafv.asking.models import about, checked_model, folder_or_id, hub_options, unknown_words, unknown_words_warning
from adafv.cli.failures import failures_as_messages, put, say, warnings_as_messages
from adafv.cli.options import DTYPES, RUN, DeviceOption, DtypeOption, ModelOption, TextOption, one_of
from adafv.cli.output import counted, model_label, writable_folder, write_whole
from adafv.printable import shortened

if TYPE_CHECKING:
    from adafv.asking.session import Session
    from adafv.evaluation.boxes import Boxed

_DATA = "What to look at"
_OUTPUT = "What to write"
PHOTO_QUESTION, WORLD_QUESTION = "Is there {a} in the image?", "is there {a}?"


def analyze(
    boxes: Annotated[
        list[Path] | None,
        typer.Argument(
            help="JSON files of pictures with boxes, or folders with images.json; see docs/analyze.md.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = "",
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the pictures. Default: images/ beside the file.", rich_help_panel=_DATA),
    ] = None,
    world: Annotated[
        bool,
        typer.Option("--world", help="Drawn scenes as well; alone, where no file is given.", rich_help_panel=_DATA),
    ] = False,
    scenes: Annotated[int, typer.Option(min=1, help="Number of drawn scenes.", rich_help_panel=_DATA)] = 200,
    no_photos: Annotated[
        bool,
        typer.Option("--no-photos", help="No pieces of photographs behind the scenes.", rich_help_panel=_DATA),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of each file, so many pictures at most.", rich_help_panel=_DATA)
    ] = None,
    ask: Annotated[
        str | None,
        typer.Option(
            help="The question; {} is the name of what is asked for, {a} the name with its article. "
            f"Default: {PHOTO_QUESTION}",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    text: TextOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--to",
            help="Folder for the figures, the report and analysis.json; made if needed.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON instead of the report.", rich_help_panel=_OUTPUT)
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.", rich_help_panel=RUN)] = None,
) -> None:
    """Ask for every boxed object by name, and see whether the scores that choose tokens know where it is.

    Prints a report: areas under the curve of text similarity and saliency, how similarities are distributed, and how many
    tokens it takes until one lies on the object; by data set and by size of the object, with 95 % intervals.

        adafv analyze --world --output analysis
        adafv analyze photos/images.json --model llava-hf/llava-1.5-7b-hf --output analysis
    """
    with failures_as_messages():
        sources = list(boxes or [])
        world = world or not sources
        one_of("--dtype", dtype, DTYPES)
        if images is not None and not images.is_dir():
            raise UsageError(f"--images {shortened(images)} is no folder; name the folder of the pictures")
        if ask is not None:
            check_text(ask, "--ask")
            if "{}" not in ask and "{a}" not in ask:
                raise UsageError(
                    "--ask has neither {} nor {a}, which stand for what is asked for; as in: Where is the {}?"
                )
        folder = None if output is None else writable_folder("--output", output)
        checked = checked_model(model)
        hub_options(folder_or_id(checked))
        _run(
            sources,
            checked,
            images,
            world,
            scenes,
            no_photos,
            limit,
            ask,
            text,
            folder,
            as_json,
            dtype,
            device,
            threads,
        )


def _run(
    sources: list[Path],
    model: str,
    images: Path | None,
    world: bool,
    scenes: int,
    no_photos: bool,
    limit: int | None,
    ask: str | None,
    scope: str | None,
    folder: Path | None,
    as_json: bool,
    dtype: str,
    device: str | None,
    threads: int | None,
) -> None:
    from adafv.evaluation.boxes import Boxed, drawn_boxes, read_boxes
    from adafv.evaluation.world.backgrounds import check_photographs

    if world and not no_photos:
        check_photographs()
    data = [read_boxes(source, images) for source in sources]
    names = [each.name for each in data]
    if len(set(names)) < len(names):
        data = [Boxed(str(source), each.pictures) for source, each in zip(sources, data, strict=True)]

    import torch

    from adafv.asking.session import Session, check_device
    from adafv.evaluation.alignment import Measured, measure
    from adafv.evaluation.analysis import Analysis
    from adafv.evaluation.drawn import side_for
    from adafv.prompts.text import SCOPES

    if scope is not None:
        one_of("--text", scope, SCOPES)
    if threads is not None:
        torch.set_num_threads(threads)
    session = Session.load(model, dtype, check_device(device))
    say(about(model, session.processor.tokenizer))
    if world:
        data.append(drawn_boxes(scenes, side_for(session.model), photos=not no_photos))
    found: list[Measured] = []
    left = {}
    with warnings_as_messages():
        for each in data:
            drawn = world and each is data[-1]
            template = ask or (WORLD_QUESTION if drawn else PHOTO_QUESTION)
            each = Boxed(each.name, each.pictures if drawn else each.pictures[:limit])
            _warn_of_unknown(session, each, template)
            told = _progress(each.name, len(each.pictures))
            some, left[each.name] = measure(
                session,
                each,
                template,
                scope=scope,
                progress=told,
            )
            found += some
    if not found:
        raise UsageError("no object could be measured: none of the boxes is in what the tower sees; check their pixels")
    templates = (
        {ask} if ask else {WORLD_QUESTION} if not sources else {PHOTO_QUESTION, *([WORLD_QUESTION] if world else [])}
    )
    analysis = Analysis(model_label(model), " / ".join(sorted(map(str, templates))), found, left)
    written = json.dumps(analysis.as_dict(), indent=1, allow_nan=False)
    files: dict[str, str] = {}
    if folder is not None:
        files = _write_figures(analysis, folder)
        write_whole(folder / "analysis.json", written + "\n")
        write_whole(folder / "analysis.md", analysis.markdown(files))
        say(f"wrote {', '.join([*files.values(), 'analysis.md', 'analysis.json'])} to {folder}")
    put(written if as_json else analysis.markdown(files).rstrip("\n"))


def _warn_of_unknown(session: "Session", data: "Boxed", template: str) -> None:
    from adafv.evaluation.alignment import asked_for

    tokenizer = session.processor.tokenizer
    names = sorted({name for each in data.pictures for name in each.boxes})
    unknown = list(
        dict.fromkeys(word for name in names for word in unknown_words(tokenizer, asked_for(name, template)))
    )
    if unknown:
        say(f"warning: {unknown_words_warning(tokenizer, unknown)}")


def _write_figures(analysis: object, folder: Path) -> dict[str, str]:
    from adafv.evaluation.analysis import Analysis

    assert isinstance(analysis, Analysis)
    drawn = {"areas": ("areas.svg", analysis.areas_figure())}
    drawn["similarities"] = ("similarities.svg", analysis.similarities_figure())
    for number, (data, figure) in enumerate(analysis.fewest_figures(), 1):
        drawn[f"fewest: {data}"] = (f"fewest-tokens-{number}.svg", figure)
    files = {}
    for name, (file, figure) in drawn.items():
        if figure:
            write_whole(folder / file, figure)
            files[name] = file
    return files


def _progress(name: str, total: int) -> Callable[[int], None]:
    told = counted(name, "pictures")
    return lambda done: told(done, total, done)
