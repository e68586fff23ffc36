"""A submission whose answer is lost is sent again under the same key; one that never left is not."""

from __future__ import annotations

import socket
import threading

import pytest

from deploy import api as api_module
from deploy.api import Api, ApiError

CREATED = b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 28\r\n\r\n" + (
    b'{"id": "job", "warnings":[]}'
)
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n" + b'{"error": "busy"}'


class Coordinator:
    """Answers connections in turn with these bytes; where they are empty it ends without an answer."""

    def __init__(self, *answers: bytes) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answers = answers
        self.keys: list[str] = []
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        for answer in self.answers:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                request = b""
                while b"specification" not in request:
                    request += connection.recv(65536)
                head = request.decode().lower()
                self.keys.append(head.partition("idempotency-key: ")[2].split("\r\n")[0])
                connection.sendall(answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "AGAIN_PAUSE_SECONDS", 0.01)


@pytest.mark.parametrize("lost", [b"", BUSY], ids=["no answer", "busy"])
def test_a_lost_answer_is_asked_for_again_under_the_same_key(lost: bytes) -> None:
    coordinator = Coordinator(lost, lost, CREATED)
    try:
        with Api(coordinator.url) as api:
            assert api.submit("specification")["id"] == "job"
    finally:
        coordinator.close()
    assert len(coordinator.keys) == 3
    assert len(set(coordinator.keys)) == 1
    assert len(coordinator.keys[0]) == 32


def test_every_submission_has_a_key_of_its_own() -> None:
    coordinator = Coordinator(CREATED, CREATED)
    try:
        for _ in range(2):
            with Api(coordinator.url) as api:
                api.submit("specification")
    finally:
        coordinator.close()
    assert len(set(coordinator.keys)) == 2


def test_what_never_left_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    monkeypatch.setattr(api_module.time, "sleep", lambda seconds: pytest.fail("it was tried again"))
    with Api(f"http://127.0.0.1:{port}") as api, pytest.raises(ApiError, match="no coordinator answers"):
        api.submit("specification")


def test_a_coordinator_that_stays_away_is_told_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "AGAIN_SECONDS", 0.1)
    coordinator = Coordinator(b"")
    with Api(coordinator.url) as api:
        coordinator.thread.join(0.01)
        closing = threading.Timer(0.05, coordinator.close)
        closing.start()
        with pytest.raises(ApiError, match="no coordinator answers"):
            api.submit("specification")
        closing.join()
