"""The coordinator's HTTP interface as an operator's program sees it. The only user of the HTTP client library.

Every call has a deadline, and every failure is an ApiError whose text says what was asked of whom.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, cast
from urllib.parse import quote
from uuid import uuid4

import httpx

CALL_SECONDS = 10.0
RESUME_SECONDS = 600.0
AGAIN_SECONDS = 15.0  # how long a submission whose answer was lost is sent again: a coordinator may be restarting
AGAIN_PAUSE_SECONDS = 0.25
BUSY = 503  # the HTTP status of a coordinator that took too long


class ApiError(Exception):
    """A call that failed. `status` is the HTTP status, 0 where no answer came.

    `is_answer_lost`: the coordinator may have done what was asked, and could not say so.
    """

    def __init__(self, text: str, status: int = 0, is_answer_lost: bool = False) -> None:
        super().__init__(text)
        self.status = status
        self.is_answer_lost = is_answer_lost or status == BUSY


class Answer(dict[str, Any]):
    """A mapping of an answer. A field that is not there is the coordinator's, not a fault of the program that asks."""

    def __missing__(self, field: str) -> Any:
        raise ApiError(
            f"the coordinator's answer has no {field!r}: it is of another release than this command; "
            "use the one that it was started with, or end it with `paramserver down` and start it anew"
        )


class Api:
    """One coordinator. Not for use by several threads at a time.

    Args:
        token: what a coordinator with --token-file asks for; empty for none.
    """

    def __init__(self, url: str, timeout_seconds: float = CALL_SECONDS, token: str = "") -> None:
        self.url = url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # The environment's proxies are for the world outside, not for a coordinator on this machine or network.
        self._client = httpx.Client(timeout=timeout_seconds, trust_env=False, headers=headers)

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def submit(self, specification: str, resume: str | None = None) -> dict[str, Any]:
        """{"id", "warnings"}. Raises ApiError with status 422 where the specification is refused.

        Sent again where the answer is lost, under a key that makes the coordinator queue it once.

        `resume`: go on from a checkpoint: "" the newest of the job's name, "RUN" or "RUN/N".
        """
        headers = {"Idempotency-Key": uuid4().hex}
        path = "/api/jobs" if resume is None else f"/api/jobs?resume={quote(resume, safe='')}"
        # Every byte of the checkpoint is read before the answer.
        patience = None if resume is None else RESUME_SECONDS
        may_have_arrived, deadline = False, time.monotonic() + AGAIN_SECONDS
        while True:
            try:
                return cast(dict[str, Any], self._call("POST", path, specification.encode(), patience, headers))
            except ApiError as error:
                # Whether the job was queued is not known, and the key makes it safe to ask again.
                may_have_arrived = may_have_arrived or error.is_answer_lost
                if not (may_have_arrived and error.status in (0, BUSY)) or time.monotonic() >= deadline:
                    raise
                time.sleep(AGAIN_PAUSE_SECONDS)

    def checkpoint(self, job: str) -> int:
        """Ask for a checkpoint; its number. Raises ApiError (409 for a job that does not train)."""
        answer = cast(dict[str, Any], self._call("POST", f"/api/jobs/{quote(job, safe='')}/checkpoint"))
        return int(answer["checkpoint"])

    def jobs(self) -> list[dict[str, Any]]:
        answer = self._call("GET", "/api/jobs")
        return cast(list[dict[str, Any]], answer["jobs"] if isinstance(answer, dict) else answer)

    def job(self, job: str) -> dict[str, Any]:
        return cast(dict[str, Any], self._call("GET", f"/api/jobs/{quote(job, safe='')}"))

    def cancel(self, job: str) -> None:
        self._call("DELETE", f"/api/jobs/{quote(job, safe='')}")

    def shut_down(self) -> list[str]:
        """Tell all shards and workers to end, those too that nobody here has started. Returns their names."""
        return [str(name) for name in cast(dict[str, list[str]], self._call("POST", "/api/shutdown"))["told"]]

    def status(self) -> dict[str, Any]:
        return cast(dict[str, Any], self._call("GET", "/api/status"))

    def model(self, job: str) -> Iterator[bytes]:
        """The bytes of the job's model.safetensors, in pieces. Raises ApiError (409 while it is not there)."""
        try:
            with self._client.stream("GET", f"{self.url}/api/jobs/{quote(job, safe='')}/model") as answer:
                if answer.is_error:
                    answer.read()
                    raise self._refused(answer)
                yield from answer.iter_bytes()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None

    def _call(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        timeout_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> object:
        patience = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            answer = self._client.request(method, self.url + path, content=content, timeout=patience, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None
        if answer.is_error:
            raise self._refused(answer)
        if not answer.content:
            return {}
        try:
            return answer.json(object_hook=Answer)
        except ValueError:
            raise ApiError(f"{self.url}{path} answers, but not in JSON: it is no coordinator", 0) from None

    def _unreachable(self, error: Exception) -> ApiError:
        reason = str(error) or type(error).__name__
        never_left = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.InvalidURL)
        return ApiError(
            f"no coordinator answers at {self.url} ({reason}); start one with `paramserver up`, or name "
            "another with --url or PARAMSERVER_URL",
            is_answer_lost=not never_left,
        )

    def _refused(self, answer: httpx.Response) -> ApiError:
        try:
            text = str(answer.json()["error"])
        except (ValueError, KeyError, TypeError):
            text = f"{self.url} answers {answer.status_code} {answer.reason_phrase}"
        return ApiError(text, answer.status_code)
