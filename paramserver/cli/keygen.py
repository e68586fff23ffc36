"""`keygen`: key pairs for processes, and a bearer token for the HTTP interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from paramserver.cli.errors import InputError
from paramserver.cli.job_file import AsJson

NAMES_OF_UP = ("coordinator", "shard-0", "shard-1", "worker-0", "worker-1")  # what `up` starts by default
TOKEN_FILE = "token"


def keygen(
    to: Annotated[Path, typer.Option("--to", help="Folder of keys; made where it is not there.", show_default=False)],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Processes (default: those of a plain `up`).")
    ] = None,
    token: Annotated[bool, typer.Option("--token", help="Make a bearer token for --token-file as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make NAME.key and NAME.key_secret for each process. Nothing is ever overwritten."""
    from paramserver.protocol.keys import KeysError, check_absent, make_keys
    from paramserver.status.access import AccessError, make_token

    wanted = list(dict.fromkeys(names or (() if token else NAMES_OF_UP)))
    try:
        for name in wanted:
            check_absent(to, name)  # before the first is made: all of them or none
        token_file = to / TOKEN_FILE if token else None
        if token_file is not None:
            make_token(token_file)
        made = {name: str(make_keys(to, name)) for name in wanted}
    except (KeysError, AccessError) as error:
        raise InputError(str(error)) from None
    if as_json:
        print(json.dumps({"folder": str(to), "secrets": made, "token_file": token_file and str(token_file)}))
        return
    for name, secret in made.items():
        print(f"{to / name}.key is for everybody, {secret} for the machine of {name} alone.")
    if token_file is not None:
        print(f"{token_file} is for the coordinator and its operators.")


def add_to(app: typer.Typer) -> None:
    app.command()(keygen)
