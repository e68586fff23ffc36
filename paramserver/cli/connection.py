"""Which coordinator a command speaks to: --url, else PARAMSERVER_URL, else the cluster of this machine.

The bearer token is PARAMSERVER_TOKEN; for the cluster of this machine also the one of its --token-file. It never goes
to a URL that somebody else's environment or command line named, unless PARAMSERVER_TOKEN says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paramserver.cli.errors import FailedError, InputError

if TYPE_CHECKING:
    from deploy.api import Api
    from deploy.home import Record

VARIABLE = "PARAMSERVER_URL"
TOKEN_VARIABLE = "PARAMSERVER_TOKEN"

Url = Annotated[
    str | None, typer.Option("--url", help=f"The coordinator, http://HOST:PORT (default: {VARIABLE}, then `up`'s).")
]


@contextmanager
def connected(url: str | None) -> Iterator[Api]:
    """The coordinator's interface; whatever it refuses inside the block ends the command with a clear message."""
    from deploy.api import Api, ApiError

    named = url or os.environ.get(VARIABLE)
    record = None if named else _local_record()
    try:
        with Api(named or (record.url if record else ""), token=_token(record)) as api:
            yield api
    except ApiError as error:
        if 400 <= error.status < 500:
            raise InputError(str(error)) from None
        is_local = url is None and VARIABLE not in os.environ
        raise FailedError((is_local and not error.status and _why_silent()) or str(error)) from None


def _why_silent() -> str:
    """Why the cluster of this machine does not answer; empty where its coordinator lives."""
    from deploy.home import default_home

    record = default_home().record()
    deaths = [death for death in record.deaths if death["name"] == "coordinator"] if record else []
    if not deaths:
        return ""
    death = deaths[-1]
    what = f"the coordinator {death['reason']} at {death['at']}"
    if death["outcome"] in ("died", "started again"):
        return f"{what} and is being started again: ask once more in a moment; see `paramserver logs coordinator`"
    return (
        f"{what} and is not started again; see `paramserver logs coordinator`. "
        "`paramserver down`, then `paramserver up`, go on with the queue"
    )


def _token(record: Record | None) -> str:
    """The bearer token to show, empty where none is known. Raises InputError."""
    from paramserver.status.access import AccessError, check_token, read_token

    try:
        if given := os.environ.get(TOKEN_VARIABLE, "").strip():
            return check_token(given, TOKEN_VARIABLE)
        return read_token(Path(record.token_file)) if record is not None and record.token_file else ""
    except AccessError as error:
        raise InputError(str(error)) from None


def _local_record() -> Record:
    from deploy.home import default_home

    home = default_home()
    record = home.record()
    if record is None:
        raise FailedError(
            f"no cluster runs on this machine (looked in {home.directory}); start one with `paramserver up`, "
            f"or name a coordinator with --url or {VARIABLE}"
        )
    if not record.url:
        raise FailedError("the cluster of this machine is still starting; try again in a moment")
    return record
