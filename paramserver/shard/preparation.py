"""What a job needs before it can be served, made beside the loop, so that heartbeats go on: its kernels compiled, and
what its journal holds read and replayed. Cold, that takes longer than a session lasts."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, Thread

from paramserver.job import Job
from paramserver.protocol.messages import PartOrder
from paramserver.shard.journal.home import Home
from paramserver.shard.journal.keeper import ShardJournal
from paramserver.shard.journal.layout import JournalError
from paramserver.shard.journal.storage import Folder
from paramserver.shard.serving import Serving, prepare


class Preparation:
    """An order that waits for what it needs. `order` may be replaced by a newer one of the same job.

    Args:
        home: where the journals are; None for a shard that was given no folder.
    """

    def __init__(
        self, order: PartOrder, home: Home | None = None, compile_for: Callable[[Job], None] = prepare
    ) -> None:
        self.order = order
        self._home = home
        self._compile_for = compile_for
        self._failure: BaseException | None = None
        self._opened: tuple[Serving, ShardJournal] | None = None
        self._folder: Folder | None = None  # of a backup
        self._is_abandoned = False
        self._lock = Lock()
        # Not a daemon: the interpreter may not end under a running compiler.
        self._thread = Thread(target=self._run, args=(order,), name="prepare")
        self._thread.start()

    def is_over(self) -> bool:
        """Whether the order can be taken. Raises what the preparation raised: JournalError is the job's to bear."""
        if self._thread.is_alive():
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def take(self) -> tuple[Serving, ShardJournal] | None:
        """When it is over: what the journal held, and the journal; None where the job has none."""
        opened, self._opened = self._opened, None
        return opened

    def take_folder(self) -> Folder:
        """When it is over, and the order is a backup's: where its records go."""
        folder, self._folder = self._folder, None
        assert folder is not None
        return folder

    def abandon(self) -> None:
        """Nobody will take it: let go of the journal, now or as soon as it is open."""
        with self._lock:
            self._is_abandoned = True
            self._let_go()

    def _let_go(self) -> None:
        opened, folder = self.take(), self._folder
        if opened is not None:
            opened[1].close()
        if folder is not None:
            folder.close()

    def _run(self, order: PartOrder) -> None:
        try:
            job = Job.model_validate_json(order.specification)
            self._compile_for(job)
            if job.durability.log == "none" and order.role == "backup":
                raise JournalError(f"job {order.job!r} has no journal that a backup could keep; use durability.log")
            if job.durability.log == "none":
                return
            if self._home is None:
                raise JournalError(
                    f"job {order.job!r} wants durability.log {job.durability.log!r}, but this shard was given no "
                    "folder to keep it in; start it with --state FOLDER, or use durability.log 'none'"
                )
            opened = self._home.open(order) if order.role == "primary" else None
            folder = self._home.hold(order) if order.role == "backup" else None
            with self._lock:
                self._opened, self._folder = opened, folder
                if self._is_abandoned:
                    self._let_go()
        except BaseException as failure:
            self._failure = failure
