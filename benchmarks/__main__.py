"""`python -m benchmarks [NAME [options]]`: see benchmarks/README.md. Without one: those that are quick."""

from __future__ import annotations

import importlib
import os
import sys
import warnings

from paramserver.cli.bench.crew import QUIET, MeasurementError
from paramserver.cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, CommandError

ALL = ("codec", "apply", "exchange", "durability", "lstm", "convergence")
APART = ("link", "bits", "coding")  # needs root; long simulations


def main(arguments: list[str]) -> int:
    name, *rest = arguments or [""]
    if name in (*ALL, *APART):
        wanted = [name]
    elif name in ("", "--quick"):
        wanted, rest = list(ALL), arguments
    else:
        print(
            f"python -m benchmarks: found {name!r}; use one of {', '.join((*ALL, *APART))} and its options "
            "(NAME --help lists them), or nothing for all but the last three",
            file=sys.stderr,
        )
        return 0 if name in ("-h", "--help") else 2
    warnings.filterwarnings("ignore", module="torch.*")
    os.environ.update(QUIET)  # torch reads it when it is imported
    try:
        for one in wanted:
            importlib.import_module(f"benchmarks.{one}").main(rest)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except CommandError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return error.exit_code
    except MeasurementError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
