"""The HTTP API, served by uvicorn in a thread of the coordinator's process. Every answer is JSON, errors too.

The handlers talk to the coordinator through `Commands` only. They hold no state and no lock.
"""

from __future__ import annotations

import re
import socket
import threading
from time import monotonic

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from paramserver.coordinator.core import EndedJobError, UnknownJobError
from paramserver.coordinator.server import BusyError
from paramserver.job import JobError
from paramserver.process import log
from paramserver.status.access import Access, AccessError, Guard
from paramserver.status.commands import Commands

MAX_BODY_BYTES = 2**20
MAX_KEY = 128
MOST_CONNECTIONS = 512  # at a time; the next one is told to try again later
START_SECONDS = 10.0
CLOSE_SECONDS = 5.0
_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:]+\]|[^:\s]+):(?P<port>[0-9]{1,5})")


class HttpError(Exception):
    """An address that cannot be served on; the text says which, why and how to mend it."""


def make_app(commands: Commands) -> FastAPI:
    """The API over `commands`."""
    app = FastAPI(title="paramserver", docs_url=None, redoc_url=None, openapi_url=None)
    _explain_errors(app)

    @app.get("/healthz")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/status")
    def status() -> JSONResponse:
        return JSONResponse(commands.status())

    @app.get("/api/jobs")
    def jobs() -> JSONResponse:
        return JSONResponse(commands.jobs())

    @app.post("/api/jobs")
    async def submit(request: Request) -> JSONResponse:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                return _error(413, f"the job specification is larger than {MAX_BODY_BYTES} bytes, the most allowed")
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError as error:
            return _error(422, f"submitted job: not UTF-8 text: {error}")
        resume = request.query_params.get("resume")
        key = request.headers.get("idempotency-key", "")
        if len(key) > MAX_KEY:
            return _error(422, f"Idempotency-Key has {len(key)} characters, allowed are {MAX_KEY}")
        job_id, warnings = await run_in_threadpool(commands.submit, text, resume, key)
        return JSONResponse({"id": job_id, "warnings": warnings}, status_code=201)

    @app.post("/api/shutdown")
    def shut_down() -> dict[str, list[str]]:
        return {"told": commands.shut_down()}

    @app.get("/api/jobs/{job_id}")
    def job(job_id: str) -> JSONResponse:
        return JSONResponse(commands.job(job_id))

    @app.delete("/api/jobs/{job_id}")
    def cancel(job_id: str) -> dict[str, str]:
        commands.cancel(job_id)
        return {"id": job_id, "state": "cancelled"}

    @app.post("/api/jobs/{job_id}/checkpoint")
    def checkpoint(job_id: str) -> JSONResponse:
        return JSONResponse({"id": job_id, "checkpoint": commands.checkpoint(job_id)}, status_code=202)

    @app.get("/api/jobs/{job_id}/model")
    def model(job_id: str) -> FileResponse:
        path = commands.model(job_id)
        if not path.is_file():
            raise EndedJobError(f"the model of job {job_id!r} is not at {path} any more: it was moved or deleted")
        return FileResponse(path, media_type="application/octet-stream", filename=f"{job_id}.safetensors")

    return app


def _error(code: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=code)


def _explain_errors(app: FastAPI) -> None:
    """Say every error as {"error": text}, never as a traceback."""

    @app.exception_handler(JobError)
    def refused(request: Request, error: JobError) -> JSONResponse:
        return _error(422, str(error))

    @app.exception_handler(UnknownJobError)
    def unknown(request: Request, error: UnknownJobError) -> JSONResponse:
        return _error(404, f"there is no job {error.args[0]!r}; GET /api/jobs lists all")

    @app.exception_handler(EndedJobError)
    def ended(request: Request, error: EndedJobError) -> JSONResponse:
        return _error(409, str(error))

    @app.exception_handler(BusyError)
    def busy(request: Request, error: BusyError) -> JSONResponse:
        return _error(503, str(error))

    @app.exception_handler(OSError)
    def no_file(request: Request, error: OSError) -> JSONResponse:
        log("http-error", level="error", path=request.url.path, kind=type(error).__name__, reason=error)
        return _error(500, f"the coordinator cannot use its files: {error.strerror or error}; mend its run folder")

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(422, str(error.errors()))

    @app.exception_handler(HTTPException)
    def other(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        log("http-error", level="error", path=request.url.path, kind=type(error).__name__, reason=error)
        answer = _error(500, f"{type(error).__name__}; the coordinator's log says more")
        answer.headers["Connection"] = "close"  # the server hangs up after such an error
        return answer


class _QuietServer(uvicorn.Server):
    """Leaves signals to the process: the coordinator's loop decides when to stop."""

    def install_signal_handlers(self) -> None:  # older releases of uvicorn
        pass


class HttpServer:
    """The API on a socket of its own thread.

    Args:
        listen: "HOST:PORT"; port 0 takes a free one. Raises HttpError where it cannot be bound, or where `access`
            would leave it open to the network.
    """

    def __init__(self, commands: Commands, listen: str, access: Access | None = None) -> None:
        self._socket = _bind(listen)
        host, port = self._socket.getsockname()[:2]
        access = access or Access()
        try:
            access.check_bound(host)
        except AccessError as error:
            self._socket.close()
            raise HttpError(str(error)) from None
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        config = uvicorn.Config(
            Guard(make_app(commands), access),
            log_config=None,
            log_level="critical",  # a peer's nonsense is no news; our own errors are logged above
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
            limit_concurrency=MOST_CONNECTIONS,
        )
        self._server = _QuietServer(config)
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._failure: BaseException | None = None

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except BaseException as error:
            self._failure = error

    def start(self) -> None:
        """Return when requests are answered. Raises HttpError."""
        self._thread.start()
        deadline = monotonic() + START_SECONDS
        while not self._server.started:
            self._thread.join(0.01)
            if not self._thread.is_alive() or monotonic() > deadline:
                raise HttpError(f"the HTTP API at {self.address} did not start: {self._failure or 'no answer in time'}")

    def close(self) -> None:
        """Stop serving; requests on their way have two seconds."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
        self._socket.close()


def _bind(listen: str) -> socket.socket:
    match = _ADDRESS.fullmatch(listen)
    if match is None or int(match["port"]) > 65535:
        raise HttpError(f"{listen!r} is no address to serve HTTP on; write HOST:PORT, for example 127.0.0.1:8080")
    host = match["host"].strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, int(match["port"])))
    except OSError as error:
        bound.close()
        raise HttpError(
            f"cannot serve HTTP on {listen!r}: {error.strerror or error}; choose another port (port 0 takes a free one)"
        ) from error
    return bound
