"""What every benchmark prints alike. It lives with the command, which users have without this folder."""

from paramserver.cli.bench.report import figure, machine, median, show, spread

__all__ = ["figure", "machine", "median", "show", "spread"]
