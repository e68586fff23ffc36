"""The HTTP API over commands that do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from paramserver.coordinator.core import EndedJobError, UnknownJobError
from paramserver.coordinator.server import BusyError
from paramserver.job import JobError
from paramserver.status.http import MAX_BODY_BYTES, HttpError, HttpServer


class FakeCommands:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self.resumes: list[str | None] = []
        self.keys: list[str] = []

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    def submit(self, text: str, resume: str | None = None, key: str = "") -> tuple[str, list[str]]:
        self._fail()
        self.submitted.append(text)
        self.resumes.append(resume)
        self.keys.append(key)
        return "job-2", ["careful"]

    def checkpoint(self, job_id: str) -> int:
        self._fail()
        return 3

    def cancel(self, job_id: str) -> None:
        self._fail()
        self.cancelled.append(job_id)

    def shut_down(self) -> list[str]:
        self._fail()
        return ["shard-0", "worker-0"]

    def jobs(self) -> list[dict[str, Any]]:
        self._fail()
        return [{"id": "job"}]

    def job(self, job_id: str) -> dict[str, Any]:
        self._fail()
        return {"id": job_id}

    def model(self, job_id: str) -> Path:
        self._fail()
        return self.folder / f"{job_id}.bin"

    def status(self) -> dict[str, Any]:
        self._fail()
        return {"job": None}


@pytest.fixture
def commands(tmp_path: Path) -> FakeCommands:
    return FakeCommands(tmp_path)


@pytest.fixture
def client(commands: FakeCommands) -> Iterator[httpx.Client]:
    server = HttpServer(commands, "127.0.0.1:0")
    server.start()
    with httpx.Client(base_url=server.address, timeout=20) as client:
        yield client
    server.close()


def test_answers_are_json(client: httpx.Client, commands: FakeCommands) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/api/status").json() == {"job": None}
    assert client.get("/api/jobs").json() == [{"id": "job"}]
    assert client.get("/api/jobs/x").json() == {"id": "x"}
    posted = client.post("/api/jobs", content="name: x")
    assert (posted.status_code, posted.json()) == (201, {"id": "job-2", "warnings": ["careful"]})
    assert commands.submitted == ["name: x"]
    for query, resume in (("?resume=", ""), ("?resume=job/3", "job/3")):
        assert client.post(f"/api/jobs{query}", content="name: x").status_code == 201
        assert commands.resumes[-1] == resume
    assert commands.resumes[0] is None
    asked = client.post("/api/jobs/x/checkpoint")
    assert (asked.status_code, asked.json()) == (202, {"id": "x", "checkpoint": 3})
    assert client.delete("/api/jobs/x").status_code == 200
    assert commands.cancelled == ["x"]


def test_a_submitters_key_is_passed_on_and_one_that_is_too_long_refused(
    client: httpx.Client, commands: FakeCommands
) -> None:
    assert client.post("/api/jobs", content="x", headers={"Idempotency-Key": "k" * 128}).status_code == 201
    assert client.post("/api/jobs", content="x").status_code == 201
    assert commands.keys == ["k" * 128, ""]
    refused = client.post("/api/jobs", content="x", headers={"Idempotency-Key": "k" * 129})
    assert refused.status_code == 422
    assert "allowed are 128" in refused.json()["error"]


def test_model_is_streamed_whole(client: httpx.Client, tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "job.bin").write_bytes(content)
    answer = client.get("/api/jobs/job/model")
    assert answer.status_code == 200
    assert answer.content == content


def test_model_that_was_deleted_is_a_clear_error(client: httpx.Client) -> None:
    answer = client.get("/api/jobs/job/model")
    assert answer.status_code == 409
    assert "moved or deleted" in answer.json()["error"]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (JobError("job: name: missing"), 422, "name: missing"),
        (UnknownJobError("x"), 404, "no job 'x'"),
        (EndedJobError("job 'x' is done already"), 409, "done already"),
        (BusyError("try again"), 503, "try again"),
        (OSError(28, "No space left on device"), 500, "No space left"),
        (RuntimeError("secret detail"), 500, "RuntimeError"),
    ],
)
def test_errors_are_json_and_never_a_traceback(
    client: httpx.Client, commands: FakeCommands, error: Exception, code: int, text: str
) -> None:
    commands.error = error
    for answer in (
        client.post("/api/jobs", content="x"),
        client.get("/api/jobs/x"),
        client.delete("/api/jobs/x"),
        client.get("/api/jobs/x/model"),
        client.post("/api/jobs/x/checkpoint"),
    ):
        assert answer.status_code == code
        assert text in answer.json()["error"]
        assert "Traceback" not in answer.text


def test_unknown_path_and_method_are_json_errors(client: httpx.Client) -> None:
    for answer in (client.get("/nothing"), client.put("/api/jobs"), client.post("/api/status")):
        assert answer.status_code in (404, 405)
        assert list(answer.json()) == ["error"]


def test_body_above_the_limit_is_refused(client: httpx.Client, commands: FakeCommands) -> None:
    answer = client.post("/api/jobs", content=b"x" * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    assert not commands.submitted


def test_body_that_is_not_text_is_refused(client: httpx.Client) -> None:
    assert client.post("/api/jobs", content=b"\xff\xfe").status_code == 422


@pytest.mark.parametrize("listen", ["", "nonsense", "127.0.0.1:99999", "300.1.1.1:0"])
def test_address_that_cannot_be_served_is_named(commands: FakeCommands, listen: str) -> None:
    with pytest.raises(HttpError, match="HTTP on"):
        HttpServer(commands, listen)


def test_port_that_is_taken_is_named(commands: FakeCommands) -> None:
    server = HttpServer(commands, "127.0.0.1:0")
    server.start()
    with pytest.raises(HttpError, match="choose another port"):
        HttpServer(commands, server.address.removeprefix("http://"))
    server.close()
