"""`paramserver`: every command. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from paramserver.cli import bench, chaos, checkpoint, cluster, data, job_file, jobs, keygen, replay, run
from paramserver.cli.errors import EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED, CommandError

app = typer.Typer(
    name="paramserver",
    help="Train one model on many ordinary machines that do not wait for each other.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
_debug = False


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global _debug
    _debug = debug


for group in (job_file, run, cluster, jobs, checkpoint, data, keygen, replay, bench, chaos):
    group.add_to(app)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. The console script exits with it."""
    try:
        code = app(arguments, prog_name="paramserver", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); Python would complain once more at its exit.
        sys.stdout = None
        return EXIT_FAILED
    except Exception as error:
        if _debug:
            raise
        return _explain(error)
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int:
    if isinstance(error, CommandError):
        print(f"paramserver: {error}", file=sys.stderr)
        return error.exit_code
    # Usage errors are known by what they offer: typer has its own copy of click in some releases.
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        return code or EXIT_INPUT
    print(
        f"paramserver: unexpected {type(error).__name__}: {error}\n"
        "This is a fault of the program; `paramserver --debug ...` shows where it arose.",
        file=sys.stderr,
    )
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
