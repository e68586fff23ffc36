"""The console script: small, so that Ctrl-C while the commands are still being imported shows no traceback."""

from __future__ import annotations

INTERRUPTED = 130  # as errors.EXIT_INTERRUPTED, which is not imported yet


def main() -> int:
    """Run the command of this process and return its exit code."""
    try:
        from paramserver.cli.__main__ import main as run

        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
