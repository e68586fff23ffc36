"""Compiling a job's kernels beside the loop, so that heartbeats go on: cold, it takes longer than a session lasts."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

from paramserver.job import Job
from paramserver.protocol.messages import ShardOrder
from paramserver.shard.core import prepare


class Preparation:
    """An order that waits for its kernels. `order` may be replaced by a newer one of the same job."""

    def __init__(self, order: ShardOrder, compile_for: Callable[[Job], None] = prepare) -> None:
        self.order = order
        self._compile_for = compile_for
        self._failure: BaseException | None = None
        # Not a daemon: the interpreter may not end under a running compiler.
        self._thread = Thread(target=self._run, name="prepare")
        self._thread.start()

    def is_over(self) -> bool:
        """Whether the order can be taken. Raises what the compilation raised."""
        if self._thread.is_alive():
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def _run(self) -> None:
        try:
            self._compile_for(Job.model_validate_json(self.order.specification))
        except BaseException as failure:
            self._failure = failure
