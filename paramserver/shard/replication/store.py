"""What a backup has of a part: a journal of its own, which holds the primary's records, and the state that follows from
them, a little behind.

Records are stored at once and applied later: storing is what the primary waits for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from threading import Thread

from msgspec import structs

from paramserver.job import Job
from paramserver.process import log
from paramserver.protocol.messages import PartOrder, Replicate
from paramserver.shard.journal.keeper import UNFINISHED, ShardJournal, must_fit, this_build
from paramserver.shard.journal.layout import Entry, JournalError, adopt_records, entries
from paramserver.shard.journal.records import TakenUp
from paramserver.shard.journal.replay import replay, restored
from paramserver.shard.journal.segments import LogReader, SegmentLog
from paramserver.shard.journal.snapshot import ASIDE, SnapshotWriter, Written, load_newest, snapshot_names
from paramserver.shard.journal.storage import File, Folder
from paramserver.shard.replication.assembly import Assembly
from paramserver.shard.serving import Serving

REPLAY_BOUND_SECONDS = 2.0  # a record waits no longer to be applied ...
REPLAY_BOUND_BYTES = 64 * 2**20  # ... nor behind more bytes than these

Line = tuple[str, int, int]  # the primary's name and incarnation, and the number that it gave


class OtherBuildError(Exception):
    """The primary computes other bits than this process would."""


class Store:
    """Belongs to the loop's thread.

    Args:
        folder: held; whatever is in it goes when a line begins.
        order: of the part.
        in_background: a snapshot is made durable and read in a thread of its own.
    """

    def __init__(self, folder: Folder, order: PartOrder, in_background: bool = True) -> None:
        self.folder = folder
        self.line: Line | None = None
        self.serving: Serving | None = None
        self._order = order
        self._must_sync = Job.model_validate_json(order.specification).durability.log == "journal+fsync"
        self._in_background = in_background
        self._assembly = Assembly()
        self._chunk = bytearray()  # of records or a manifest, until it is whole
        self._manifest = b""
        self._arrays: File | None = None
        self._log: SegmentLog | None = None
        self._journal: ShardJournal | None = None
        self._restoring: Thread | None = None
        self._restored: Serving | None = None
        self._failure: BaseException | None = None
        self._pending: deque[tuple[float, bytearray]] = deque()  # records to apply, and when they came
        self._pending_bytes = 0
        self._entries: Iterator[Entry] | None = None  # of the first of these
        self.applied = 0
        """The last record that `serving` has."""

    # ------------------------------------------------------------------------- to take

    @property
    def received(self) -> int:
        """Bytes of the line."""
        return self._assembly.received

    @property
    def record(self) -> int:
        """The last one that is as durable here as the job asks for; 0 before all of the snapshot is."""
        return self._log.durable if self._log is not None and self.serving is not None else 0

    @property
    def trouble(self) -> str:
        """Why the records cannot be written now."""
        return self._log.trouble if self._log is not None else ""

    @property
    def is_restoring(self) -> bool:
        """Whether a snapshot is made durable and read in its thread."""
        return self._restoring is not None

    @property
    def written_bytes(self) -> int:
        return self._log.written_bytes if self._log is not None else 0

    def begin(self, line: Line) -> None:
        """Forget what is here, and take this line from its start. Raises OSError; then there is no line."""
        self.drop()
        self.folder.create(UNFINISHED).close()
        self.folder.sync()  # what is left, should we die now, must not pass for a journal
        for name in self.folder.names():
            if name != UNFINISHED:
                self.folder.remove(name)
        self.line = line

    def drop(self) -> None:
        """There is no line; the files stay until another one begins."""
        if self._restoring is not None:
            self._restoring.join()
        if self._journal is not None:
            self._journal.release()
            self._log = None
        self.line = self.serving = self._restoring = self._restored = self._failure = None
        self._journal = self._entries = None
        if self._arrays is not None:
            self._arrays.close()
            self._arrays = None
        if self._log is not None:
            self._log.close()
            self._log = None
        self._assembly = Assembly()
        self._chunk.clear()
        self._pending.clear()
        self._pending_bytes = self.applied = 0

    def take(self, message: Replicate, frame: memoryview, now: float) -> None:
        """Take a piece of the line, in any order.

        Raises ValueError for what is no such piece: it is as if its chunk had not come. Raises OtherBuildError,
        JournalError, and OSError where the folder refuses a snapshot; then the line is of no use.
        """
        for piece, data in self._assembly.take(message, frame):
            is_whole = piece.at + len(data) == piece.begin + piece.chunk_bytes
            if piece.at != piece.begin + len(self._chunk) and piece.kind != "arrays":
                self._assembly.go_back(piece.begin)
                raise ValueError(f"the piece at byte {piece.at} does not follow the {len(self._chunk)} of its chunk")
            if piece.kind == "arrays":
                self._take_arrays(piece, data, is_whole)
            elif is_whole and not self._chunk:
                self._take_chunk(piece, bytearray(data), now)
            else:
                self._chunk += data
                if is_whole:
                    chunk, self._chunk = self._chunk, bytearray()
                    self._take_chunk(piece, chunk, now)

    def _take_chunk(self, piece: Replicate, chunk: bytearray, now: float) -> None:
        if piece.kind == "manifest":
            self._manifest = bytes(chunk)
            return
        if self._log is None:
            self._open_log(0)
        assert self._log is not None
        try:
            adopt_records(chunk, self._log.number + 1, piece.record, self._log.durable)
            if self._log.number == 0:
                self._take_up(next(entries(chunk)))
        except ValueError:
            self._assembly.go_back(piece.begin)
            raise
        self._log.append_bytes(chunk, piece.record)
        self._pending.append((now, chunk))
        self._pending_bytes += len(chunk)

    def _take_up(self, first: Entry) -> None:
        """The first record of a young journal."""
        if not isinstance(first.record, TakenUp):
            raise ValueError(f"record 1 is {type(first.record).__name__}, not the beginning of a journal")
        self._must_fit(first.record.order, first.record.build)
        self._serve(Serving(first.record.order))

    def _take_arrays(self, piece: Replicate, data: memoryview, is_whole: bool) -> None:
        _, arrays = snapshot_names(piece.record)
        if self._arrays is None:
            self._arrays = self.folder.create(arrays + ASIDE)
        self._arrays.write([data])
        if not is_whole:
            return
        file, self._arrays = self._arrays, None
        self._open_log(piece.record)
        self.applied = piece.record
        written = Written(arrays.removesuffix(".safetensors"), file, self._manifest)

        def restore() -> None:
            try:
                SnapshotWriter(self.folder).seal(written)
                found = load_newest(self.folder)
                assert found is not None
                manifest, values = found
                self._must_fit(manifest.state.order, manifest.build)
                self._restored = restored(manifest.state, values)
            except BaseException as failure:
                self._failure = failure

        if self._in_background:
            self._restoring = Thread(target=restore, name="restore")
            self._restoring.start()
        else:
            restore()
            self.look_after()

    def _open_log(self, after: int) -> None:
        reader = LogReader(self.folder, after)
        for _ in reader:
            raise JournalError(f"{self.folder.path}: has records where a backup begins")
        self._log = SegmentLog(reader, self._must_sync)

    def _must_fit(self, written: PartOrder, build: str) -> None:
        # Terms are judged by whoever takes the messages: the primary may have heard of a newer one before us.
        must_fit(self.folder, structs.replace(written, term=0), self._order)
        if build != this_build():
            raise OtherBuildError(
                f"the primary is [{build}], this backup is [{this_build()}]: its steps might give other bits; "
                "use machines and packages alike for all shards, or durability.backups: 0"
            )

    def _serve(self, serving: Serving) -> None:
        assert self._log is not None
        self.folder.remove(UNFINISHED)
        self.folder.sync()
        self.serving = serving
        self._journal = ShardJournal(self.folder, self._log, serving, self._in_background)

    def look_after(self) -> None:
        """Take over a snapshot that has been read. Raises what `take` does."""
        if self._restoring is not None:
            if self._restoring.is_alive():
                return
            self._restoring = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        serving, self._restored = self._restored, None
        if serving is not None:
            self._serve(serving)
            log("backup-restored", folder=self.folder.path, record=self.applied)

    def commit(self) -> bool:
        """Make durable what was taken; False while the disk refuses. Then bound the log, where it is due."""
        if self._log is None:
            return True
        if self._journal is None:
            return self._log.commit()
        if not self._journal.commit():
            return False
        if self._journal.is_due and self._journal.may_snapshot:
            self.apply_all()
        if self.applied == self._journal.number:
            assert self.serving is not None
            self._journal.snapshot_if_due(self.serving)
        return True

    # ------------------------------------------------------------------------- to apply

    @property
    def has_pending(self) -> bool:
        """Whether records wait to be applied, and can be."""
        return bool(self._pending) and self.serving is not None

    def is_overdue(self, now: float) -> bool:
        """Whether records have waited for as long as they may."""
        return self.has_pending and (
            now - self._pending[0][0] > REPLAY_BOUND_SECONDS or self._pending_bytes > REPLAY_BOUND_BYTES
        )

    def apply_one(self) -> None:
        """Apply the next record. Raises JournalError where it does not fit."""
        assert self.serving is not None
        if self._entries is None:
            self._entries = entries(self._pending[0][1])
        entry = next(self._entries, None)
        if entry is None:
            _, chunk = self._pending.popleft()
            self._pending_bytes -= len(chunk)
            self._entries = None
            return
        if entry.number > 1:
            replay(self.serving, entry)
        self.applied = entry.number

    def apply_all(self) -> None:
        while self.has_pending:
            self.apply_one()

    # ------------------------------------------------------------------------- to promote

    def finish(self) -> tuple[Serving, ShardJournal] | None:
        """All that was stored, applied, and the journal to write on in; None where there is no whole state.

        The folder goes with the journal.
        """
        if self._restoring is not None:
            self._restoring.join()
            self.look_after()
        serving, journal = self.serving, self._journal
        if serving is None or journal is None:
            return None
        self.apply_all()
        serving.journal = journal
        return serving, journal

    def close(self) -> None:
        """Let go of the folder. What is not committed is forgotten."""
        self.drop()
        self.folder.close()
