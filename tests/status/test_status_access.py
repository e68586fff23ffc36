"""Who may ask the HTTP API for what: tokens, pages of other sites, names that are not ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.status.access import Access, AccessError, make_access, read_token
from paramserver.status.http import HttpError, HttpServer

TOKEN = "an-honest-token-0123456789"
CHANGES = [
    ("POST", "/api/jobs"),
    ("POST", "/api/shutdown"),
    ("POST", "/api/jobs/x/checkpoint"),
    ("DELETE", "/api/jobs/x"),
    ("PUT", "/api/jobs"),
    ("PATCH", "/later"),
]
READS = [("GET", "/api/status"), ("GET", "/api/jobs"), ("GET", "/api/jobs/x"), ("GET", "/api/jobs/x/model")]


class OpenCommands:
    """Commands that note what reached them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reached: list[str] = []

    def submit(self, text: str, resume: str | None = None, key: str = "") -> tuple[str, list[str]]:
        self.reached.append("submit")
        return "job", []

    def checkpoint(self, job_id: str) -> int:
        self.reached.append("checkpoint")
        return 1

    def cancel(self, job_id: str) -> None:
        self.reached.append("cancel")

    def shut_down(self) -> list[str]:
        self.reached.append("shut_down")
        return []

    def jobs(self) -> list[dict[str, Any]]:
        self.reached.append("jobs")
        return []

    def job(self, job_id: str) -> dict[str, Any]:
        self.reached.append("job")
        return {}

    def model(self, job_id: str) -> Path:
        self.reached.append("model")
        return self.folder / "model"

    def status(self) -> dict[str, Any]:
        self.reached.append("status")
        return {}


Serve = Callable[[Access], httpx.Client]


@pytest.fixture
def commands(tmp_path: Path) -> OpenCommands:
    (tmp_path / "model").write_bytes(b"weights")
    return OpenCommands(tmp_path)


@pytest.fixture
def serve(commands: OpenCommands) -> Iterator[Serve]:
    closing: list[Callable[[], None]] = []

    def start(access: Access) -> httpx.Client:
        server = HttpServer(commands, "127.0.0.1:0", access)
        server.start()
        client = httpx.Client(base_url=server.address, timeout=20)
        closing.extend((client.close, server.close))
        return client

    yield start
    for close in closing:
        close()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(("method", "path"), CHANGES)
@pytest.mark.parametrize("headers", [{}, bearer("a-wrong-token-0123456789"), {"Authorization": f"Basic {TOKEN}"}])
def test_change_without_the_token_reaches_nothing(
    serve: Serve, commands: OpenCommands, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = serve(Access(TOKEN)).request(method, path, content="name: x", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith('Bearer realm="paramserver"')
    assert "PARAMSERVER_TOKEN" in answer.json()["error"]
    assert TOKEN not in answer.text
    assert not commands.reached


def test_change_with_the_token_is_done(serve: Serve, commands: OpenCommands) -> None:
    client = serve(Access(TOKEN))
    assert client.post("/api/jobs", content="name: x", headers=bearer(TOKEN)).status_code == 201
    assert client.delete("/api/jobs/x", headers={"Authorization": f"bearer  {TOKEN}"}).status_code == 200
    assert commands.reached == ["submit", "cancel"]


@pytest.mark.parametrize(("method", "path"), READS)
def test_reading_needs_the_token_only_where_the_operator_says_so(serve: Serve, method: str, path: str) -> None:
    assert serve(Access(TOKEN)).request(method, path).status_code == 200
    closed = serve(Access(TOKEN, for_reading=True))
    assert closed.request(method, path).status_code == 401
    assert closed.request(method, path, headers=bearer(TOKEN)).status_code == 200
    assert closed.get("/nothing-there").status_code == 401  # nobody learns what exists


def test_health_is_always_open(serve: Serve) -> None:
    client = serve(Access(TOKEN, for_reading=True))
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 200
    assert client.post("/healthz").status_code == 401


FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://127.0.0.1:1"},  # another port of this machine is another site
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("access", [Access(), Access(TOKEN)])
def test_page_of_another_site_changes_nothing(
    serve: Serve, commands: OpenCommands, access: Access, headers: dict[str, str]
) -> None:
    client = serve(access)
    for method, path in CHANGES:
        answer = client.request(method, path, content="name: x", headers={**headers, **bearer(TOKEN)})
        assert answer.status_code == 403
        assert "web page" in answer.json()["error"]
    assert not commands.reached


def test_own_page_may_change_things(serve: Serve, commands: OpenCommands) -> None:
    client = serve(Access())
    own = {"Origin": str(client.base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/jobs", content="name: x", headers=own).status_code == 201
    assert commands.reached == ["submit"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8420", "127.0.0.1.evil.example", "", "a b", "[::1"])
def test_name_that_is_not_ours_reads_and_changes_nothing(serve: Serve, commands: OpenCommands, host: str) -> None:
    """A name that its owner points at this machine is the page's own site for a browser."""
    client = serve(Access())
    for method, path in [*CHANGES, *READS]:
        headers = {"Host": host, "Origin": f"http://{host}"} if method in ("GET", "POST") else {"Host": host}
        answer = client.request(method, path, content="name: x", headers=headers)
        assert answer.status_code in (400, 403)  # the server itself refuses some
    assert not commands.reached


@pytest.mark.parametrize("host", ["localhost:1", "LOCALHOST", "10.0.0.7:8420", "[::1]:8420", "node-a", "node-a:80"])
def test_addresses_and_own_names_are_ours(host: str) -> None:
    access = Access(names=frozenset({"node-a"}))
    assert access.deny("POST", "/api/jobs", {"host": host}) is None


def test_token_makes_any_name_ours() -> None:
    access = make_access("0.0.0.0:8420")
    assert access.deny("GET", "/api/status", {"host": "coordinator"}) is not None
    with_token = Access(TOKEN)
    headers = {"host": "coordinator", "authorization": f"Bearer {TOKEN}"}
    assert with_token.deny("POST", "/api/jobs", headers) is None


@given(st.text(max_size=40), st.sampled_from(["Bearer ", "bearer ", "Bearer", "", "Basic "]))
def test_nothing_but_the_token_is_the_token(given_token: str, scheme: str) -> None:
    headers = {"host": "127.0.0.1", "authorization": scheme + given_token}
    denial = Access(TOKEN).deny("POST", "/api/jobs", headers)
    is_right = scheme.lower() == "bearer " and given_token.strip() == TOKEN
    assert (denial is None) == is_right


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::", "2001:db8::1", "fe80::1%eth0"])
def test_open_api_beyond_loopback_is_refused_with_the_mend(host: str) -> None:
    with pytest.raises(AccessError, match="--token-file FILE.*127.0.0.1"):
        Access().check_bound(host)
    Access(TOKEN).check_bound(host)
    Access(is_insecure=True).check_bound(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1"])
def test_open_api_on_loopback_is_allowed(host: str) -> None:
    Access().check_bound(host)


def test_server_beyond_loopback_without_a_token_does_not_start(commands: OpenCommands) -> None:
    with pytest.raises(HttpError, match="--token-file"):
        HttpServer(commands, "0.0.0.0:0")
    HttpServer(commands, "0.0.0.0:0", Access(TOKEN)).close()


def test_token_of_a_file_is_taken_without_its_line_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    assert read_token(path) == TOKEN
    assert make_access("127.0.0.1:0", path, for_reading=True).for_reading


@pytest.mark.parametrize("content", ["", "short", "two words of length", "x" * 600, "ümlaut-ümlaut-ümlaut"])
def test_file_that_holds_no_token_is_refused_without_quoting_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(AccessError, match="no token; one is 16 to 512") as caught:
        read_token(path)
    assert not content or content not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_token_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    os.chmod(path, mode)
    with pytest.raises(AccessError, match="chmod 600"):
        read_token(path)


def test_missing_token_file_and_reading_without_a_token_are_named(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="No such file"):
        read_token(tmp_path / "nothing")
    with pytest.raises(AccessError, match="give --token-file FILE as well"):
        make_access("127.0.0.1:0", None, for_reading=True)
