"""`data list`: which data sets are here, which are not, and where to put those."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from paramserver.cli.job_file import AsJson

group = typer.Typer(help="Data sets.", no_args_is_help=True)


@group.callback()
def _group() -> None:
    """Data sets."""


@group.command("list")
def list_data(as_json: AsJson = False) -> None:
    """Say of each data set whether it is here, and how to use it or get it."""
    from models.datasets.catalogue import catalogue

    found = catalogue()
    if as_json:
        print(json.dumps([asdict(data_set) for data_set in found], indent=1))
        return
    for data_set in found:
        print(f"{data_set.name:<14} {'here' if data_set.is_here else 'not here':<9} {data_set.what}")
        print(f"{'':<14} {data_set.where}")
        print(f"{'':<14} {data_set.how}")


def add_to(app: typer.Typer) -> None:
    app.add_typer(group, name="data")
