"""`python -m benchmarks [exchange|apply|convergence] [--quick]`: see benchmarks/README.md."""

from __future__ import annotations

import argparse
import warnings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("which", nargs="*", choices=["exchange", "apply", "convergence", []], default=[])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps: for a look, not for a figure")
    options = parser.parse_args()
    wanted = options.which or ["apply", "exchange", "convergence"]
    warnings.filterwarnings("ignore", module="torch.*")
    from benchmarks import convergence, exchange

    if "apply" in wanted:
        exchange.apply_rate(rounds=2 if options.quick else 5, seconds=2.0)
    if "exchange" in wanted:
        sizes = (100_000, 1_000_000, 10_000_000)
        exchange.run(sizes, rounds=1 if options.quick else 5, seconds=1.0 if options.quick else 3.0)
    if "convergence" in wanted:
        convergence.run(
            steps=200 if options.quick else 1200,
            seeds=range(1 if options.quick else 3),
            workers=(2,) if options.quick else (2, 4),
        )


if __name__ == "__main__":
    main()
