"""Running commands of adafv in this process."""

from typer.testing import CliRunner, Result

from adafv.cli import app


def run(*arguments: object, **options: object) -> Result:
    """`adafv` with these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]


def refused(result: Result, code: int, *parts: str) -> None:
    """A message on standard error, nothing on standard output, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    said = " ".join(result.stderr.split())
    for part in parts:
        assert part in said
