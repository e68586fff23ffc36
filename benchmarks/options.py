"""Options that benchmarks have in common."""

from __future__ import annotations

import argparse


def make_parser(name: str, about: str | None, rounds: int = 5, seconds: float = 3.0) -> argparse.ArgumentParser:
    """A parser with --quick, --rounds and --seconds; these two are None where the user leaves them out."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="little of everything: for a look, not for a figure")
    parser.add_argument("--rounds", type=positive, help=f"interleaved launches (default {rounds}, quick 1)")
    parser.add_argument("--seconds", type=float, help=f"length of a timed part (default {seconds:g}, quick a third)")
    parser.set_defaults(full_rounds=rounds, full_seconds=seconds)
    return parser


def rounds_of(given: argparse.Namespace) -> int:
    return int(given.rounds or (1 if given.quick else given.full_rounds))


def seconds_of(given: argparse.Namespace) -> float:
    return float(given.seconds or (given.full_seconds / 3 if given.quick else given.full_seconds))


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number
