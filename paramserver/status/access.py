"""Who may ask the HTTP API for what: a bearer token, and no web page of another site.

Two dangers, two rules. A stranger who reaches the port: what changes something needs the token, reading too where
the operator says so. A page in the browser of somebody who may reach the port: browsers name the page's site in
`Origin` and `Sec-Fetch-Site`, so a change that a foreign page asks for is refused; and a name that its owner has
pointed at this machine (DNS rebinding) is no name of ours in `Host`, so it reads and changes nothing without a token.

Nothing here knows the API: every path but HEALTH is guarded, those that come later too.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEALTH = "/healthz"  # always open: it says nothing but that somebody answers
READING = frozenset({"GET", "HEAD", "OPTIONS"})
TOKEN_BYTES = 32  # of a fresh token, before it is written in base 64
LEAST_TOKEN, MOST_TOKEN = 16, 512  # characters
MAX_TOKEN_FILE_BYTES = 4096
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, b64token
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[^:\[\]/\s]+)(?::[0-9]{1,5})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}

Scope = MutableMapping[str, Any]
Calls = Callable[..., Awaitable[Any]]
Application = Callable[[Scope, Calls, Calls], Awaitable[None]]


class AccessError(Exception):
    """What the operator gave cannot guard the API; the text says what, why and how to mend it."""


@dataclass(frozen=True)
class Denial:
    """An answer instead of what was asked for."""

    status: int
    text: str
    challenge: str = ""  # WWW-Authenticate


@dataclass(frozen=True)
class Access:
    """Args:
    token: what `Authorization: Bearer` must carry; empty for none.
    for_reading: whether reading needs the token as well. Raises AccessError where there is none.
    names: names of this machine that a request may use beside IP addresses and localhost.
    is_insecure: the operator lets everybody on the network change everything.
    """

    token: str = field(default="", repr=False)
    for_reading: bool = False
    names: frozenset[str] = frozenset()
    is_insecure: bool = False

    def __post_init__(self) -> None:
        if self.for_reading and not self.token:
            raise AccessError("reading cannot need a token where there is none; give --token-file FILE as well")

    def check_bound(self, host: str) -> None:
        """Raise AccessError where an API that is bound to this address would be open to the network."""
        if self.token or self.is_insecure or ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            return
        raise AccessError(
            f"HTTP on {host} without a token would let everybody on the network submit and cancel jobs; give "
            "--token-file FILE (`paramserver keygen --to DIR --token` makes one), or bind 127.0.0.1 and reach it "
            "through ssh -L; --insecure leaves it open"
        )

    def deny(self, method: str, path: str, headers: dict[str, str]) -> Denial | None:
        """Why a request is refused, or None where it may go on. Header names in lower case."""
        if path == HEALTH and method in READING:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_bearer = scheme.lower() == "bearer"
        has_token = bool(self.token) and is_bearer and hmac.compare_digest(given.strip().encode(), self.token.encode())
        is_change = method not in READING
        if is_change and (page := _foreign_page(headers)):
            return Denial(
                403,
                f"{method} {path}: a web page of {page} may change nothing here; use the command line, or a "
                "program that sends no Origin",
            )
        if not has_token and not self._is_ours(headers.get("host", "")):
            return Denial(
                403,
                f"{method} {path}: found the Host {headers.get('host', '')[:200]!r}, which this coordinator does not "
                "know as its own; use its IP address, or start it with --http-name NAME",
            )
        if self.token and not has_token and (is_change or self.for_reading or is_bearer):
            return self._unauthorised(method, path, is_bearer)
        return None

    @staticmethod
    def _unauthorised(method: str, path: str, is_bearer: bool) -> Denial:
        found = "the bearer token is not this coordinator's" if is_bearer else "it needs a bearer token"
        return Denial(
            401,
            f"{method} {path}: {found}; send `Authorization: Bearer TOKEN`, for the command line set "
            "PARAMSERVER_TOKEN to what the coordinator's --token-file holds",
            'Bearer realm="paramserver"' + (', error="invalid_token"' if is_bearer else ""),
        )

    def _is_ours(self, host: str) -> bool:
        match = _HOST.fullmatch(host.strip().lower())
        if match is None:
            return False
        name = match["name"].strip("[]").rstrip(".")
        return name == "localhost" or name in self.names or _is_address(name)


def make_access(
    listen: str,
    token_file: Path | None = None,
    for_reading: bool = False,
    names: Iterable[str] = (),
    is_insecure: bool = False,
) -> Access:
    """What guards an API on "HOST:PORT". Raises AccessError."""
    token = "" if token_file is None else read_token(token_file)
    known = {listen.rpartition(":")[0], socket.gethostname(), *names}
    return Access(token, for_reading, frozenset(name.strip("[]").rstrip(".").lower() for name in known), is_insecure)


def read_token(path: Path) -> str:
    """The token of a file that nobody but its owner may read. Raises AccessError; no text quotes what was found."""
    field = f"--token-file {path}"
    try:
        with path.open("rb") as file:
            status, content = path.stat(), file.read(MAX_TOKEN_FILE_BYTES + 1)
    except OSError as error:
        raise AccessError(f"{field}: cannot be read: {error.strerror}; name a file with one token") from None
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
        raise AccessError(f"{field}: others than its owner may use it; mend that with `chmod 600 {path}`")
    return check_token(content.decode("ascii", "replace").strip(), field)


def make_token(path: Path) -> str:
    """Write a fresh token into a file that only its owner may read. Never overwrites. Raises AccessError."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise AccessError(f"{path} is there already, and is never overwritten; remove it to replace it") from None
    except OSError as error:
        raise AccessError(f"{path}: cannot be written: {error.strerror}; name another folder") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{token}\n")
    return token


def check_token(token: str, source: str) -> str:
    """The token itself. Raises AccessError where it is none."""
    if not LEAST_TOKEN <= len(token) <= MOST_TOKEN or not _TOKEN.fullmatch(token):
        raise AccessError(
            f"{source}: found {len(token)} characters that are no token; one is {LEAST_TOKEN} to {MOST_TOKEN} letters, "
            "digits or any of ._~+/-, on one line; `paramserver keygen --to DIR --token` makes one"
        )
    return token


class Guard:
    """The API with its door closed: whatever `access` denies never reaches it."""

    def __init__(self, app: Application, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Calls, send: Calls) -> None:
        if scope["type"] == "websocket":
            # The API has none, and browsers let every page open them.
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            denial = self._access.deny(scope["method"], scope["path"], headers)
            if denial is not None:
                await _answer(denial, send)
                return
        await self._app(scope, receive, send)


async def _answer(denial: Denial, send: Calls) -> None:
    body = json.dumps({"error": denial.text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if denial.challenge:
        headers.append((b"www-authenticate", denial.challenge.encode()))
    await send({"type": "http.response.start", "status": denial.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _foreign_page(headers: dict[str, str]) -> str:
    """The site whose page asks, where that is not this very API; empty where no browser says so."""
    origin = headers.get("origin")
    if origin is not None:
        scheme, _, authority = origin.lower().partition("://")
        default = _DEFAULT_PORTS.get(scheme, "")
        own = headers.get("host", "").strip().lower()
        is_own = bool(authority) and authority.removesuffix(default) == own.removesuffix(default)
        return "" if is_own else origin[:200] or "another site"
    # Older than this header are only browsers that send Origin with every change.
    return "another site" if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
