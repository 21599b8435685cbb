"""`adafv serve`: vLLM's OpenAI-compatible server, pruned."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adafv.asking.failures import UsageError
from adafv.asking.models import folder_or_id
from adafv.cli.failures import failures_as_messages, put
from adafv.cli.options import METHOD, DefaultMethodOption, MethodOptions, ObjectiveOption, TextOption, with_shorthands
from adafv.core.budget import Budget
from adafv.defaults import method_or_default

if TYPE_CHECKING:
    from adafv.engines.vllm.launch import Launch

_SERVER = "Server"
_RequestBudgets = Annotated[
    bool,
    typer.Option(
        "--request-budgets",
        help="Let a request have its own budget, and its own crops. Turns on vLLM's --trust-request-mm-kwargs; the image "
        "processor's other options stay the server's.",
        rich_help_panel=METHOD,
    ),
]
_MaxKeep = Annotated[
    str | None, typer.Option(help="Of --request-budgets: the largest. Default: all.", rich_help_panel=METHOD)
]


def serve(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, its id on the Hugging Face Hub, or bundled.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION...]", help="Further options of vLLM's server, behind --.")
    ] = None,
    *,
    keep: Annotated[
        str,
        typer.Option(
            help="Visual tokens to keep of every image: a number (64; of smaller images all), a share (0.1 or 10%), or all.",
            rich_help_panel=METHOD,
        ),
    ],
    method: DefaultMethodOption = None,
    option: MethodOptions = None,
    objective: ObjectiveOption = None,
    text: TextOption = None,
    crops: Annotated[
        str,
        typer.Option(
            help="Crops that the tower sees, where the model cuts pictures up: all; thumbnail; or how many beside it.",
            rich_help_panel=METHOD,
        ),
    ] = "all",
    request_budgets: _RequestBudgets = False,
    max_keep: _MaxKeep = None,
    tower_cache_mb: Annotated[
        float,
        typer.Option(min=0, help="MiB per worker for images encoded before; 0: none.", rich_help_panel=METHOD),
    ] = 256,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Default: vLLM's, every one.", rich_help_panel=_SERVER)
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port. Default: vLLM's, 8000.", rich_help_panel=_SERVER)
    ] = None,
    print_command: Annotated[
        bool,
        typer.Option(
            "--print-command", help="Print vLLM's command line instead of running it.", rich_help_panel=_SERVER
        ),
    ] = False,
) -> None:
    r"""Serve a model with vLLM, with most visual tokens pruned.

    Needs vLLM: pip install 'vllm>=0.31,<0.34'. Options of vLLM's server go behind two dashes.

        adafv serve llava-hf/llava-1.5-7b-hf --keep 64 --port 8000 -- --tensor-parallel-size 2
    """
    with failures_as_messages():
        budget = Budget.of(keep)
        chosen = method_or_default(method, objective)
        settings = _settings(budget, chosen, with_shorthands(option, objective=objective), text, tower_cache_mb)
        if crops != "all":
            settings["crops"] = crops
        settings["max_keep"] = _max_keep(max_keep, budget, request_budgets).keep
        listening = _listening(host, port, request_budgets)
        launched = _checked(_checked_model(model), settings, [*listening, *(options or [])], not print_command)
        _run(launched, print_command)


def _settings(
    keep: Budget, method: str, written: Sequence[str], text: str | None, tower_cache_mb: float
) -> dict[str, Any]:
    """What the server is told of pruning; what is not given is left out."""
    settings: dict[str, Any] = {"keep": keep.keep, "method": method, "tower_cache_mb": tower_cache_mb}
    if written:
        from adafv.methods.options import parameters_from_options

        settings["parameters"] = parameters_from_options(method, written)
    if text is not None:
        settings["text"] = text
    return settings


def _listening(host: str | None, port: int | None, request_budgets: bool) -> list[str]:
    """The options of vLLM's server that have a name of their own here."""
    trusting = ["--trust-request-mm-kwargs"] if request_budgets else []
    return [*_given("--host", host), *_given("--port", port), *trusting]


def _run(launched: "Launch", print_command: bool) -> None:
    """Run it, or only say what would be."""
    if print_command:
        put(launched.shown)
    else:
        typer.echo(launched.shown, err=True)
        launched.run()


def _checked_model(model: str) -> str:
    if model in ("bundled-next", "bundled-details-next"):
        first = model.removesuffix("-next")
        raise UsageError(f"vLLM cannot read {model}, which shares its weights with {first}; serve {first}")
    if not model.strip() or model.startswith("-"):
        raise UsageError(
            f"{model!r} is not a model; name it first, as in: adafv serve llava-hf/llava-1.5-7b-hf --keep 64"
        )
    return model


def _max_keep(max_keep: str | None, keep: Budget, request_budgets: bool) -> Budget:
    if request_budgets:
        return Budget.of("all" if max_keep is None else max_keep, "max_keep")
    if max_keep is not None:
        raise UsageError("--max-keep bounds the budgets of requests; add --request-budgets, or leave it out")
    return keep  # what no request can ask for, vLLM needs no memory for


def _given(option: str, value: object) -> list[str]:
    return [] if value is None else [option, str(value)]


def _checked(model: str, settings: dict[str, Any], options: list[str], needs_vllm: bool) -> "Launch":
    """What is to be run. Everything that can be found wrong without vLLM is: it takes ten seconds to import."""
    from adafv.engines.serving.settings import ServerSettings
    from adafv.engines.vllm import check_crops
    from adafv.engines.vllm.launch import (
        LaunchError,
        installed_vllm,
        launch,
        machine_settings,
        overrides_option,
        pruned_architecture,
        split_overrides,
        value_of,
    )

    overrides, others = split_overrides(options)
    crops = ServerSettings.of(settings).crops
    distribution = None
    try:
        distribution = installed_vllm()
    except LaunchError:
        if needs_vllm:
            raise
    source = folder_or_id(model)
    architecture = pruned_architecture(source, value_of("--revision", others))
    check_crops(crops, architecture)
    switch = overrides_option(architecture, settings, overrides)
    named = ["--served-model-name", model] if source != model else []
    if distribution is None:  # the command is for another machine
        return launch("vllm", source, [*switch, *named, *others])
    machine = machine_settings(distribution, source, others)
    for note in machine.notes:
        typer.echo(f"note: {note}", err=True)
    return launch(distribution, source, [*switch, *named, *machine.options, *others], machine.environment)
