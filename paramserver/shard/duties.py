"""What a part owes the coordinator when its order speaks of a checkpoint: its state, copied and sent in pieces, or the
blocks that it goes on from, asked for and taken. No I/O: the loop sends what is due and brings the answers."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from paramserver.process import log
from paramserver.protocol.messages import CheckpointPiece, CheckpointStored, KeptBlock, TakeBlock
from paramserver.protocol.pieces import AGAIN_SECONDS, Upload
from paramserver.shard.checkpoint import part_file, take_block
from paramserver.shard.journal.replay import kept
from paramserver.shard.serving import Serving

BLOCKS_ASKED = 2  # at a time: the coordinator reads one while the other is on its way


Errand = tuple[CheckpointPiece | TakeBlock, Sequence[memoryview]]


class CheckpointDuty:
    """Of one part. Belongs to the loop's thread."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._told: Serving | None = None
        self._upload: Upload | None = None
        self._asked: dict[int, float] = {}  # blocks that are asked for, and when they are asked for again
        self.number = 0
        """The checkpoint of which the state is copied; 0 where there is none."""
        self.failure = ""
        """Why blocks of a checkpoint cannot be gone on from: a clear message."""

    def follow(self, serving: Serving | None) -> None:
        """The order has changed. A copy is made at once: no update is on its way while the workers wait."""
        if serving is not self._told:
            self._told = serving
            self.number, self._upload, self.failure = 0, None, ""
            self._asked.clear()
        wanted = 0 if serving is None else serving.order.checkpoint
        if wanted == self.number:
            return
        self.number, self._upload = wanted, None
        if serving is not None and wanted:
            self._upload = Upload(part_file(self._part, *kept(serving)))
            log("checkpoint-copied", job=serving.order.job, part=self._part, number=wanted, bytes=self._upload.total)

    def due(self, serving: Serving | None, shard: str, incarnation: int, now: float) -> list[Errand]:
        """Messages, with their frames, that this process must send now."""
        if serving is None:
            return []
        job = serving.order.job
        errands: list[Errand] = [
            (TakeBlock(name=shard, incarnation=incarnation, job=job, part=self._part, block=block), ())
            for block in self._missing(serving, now)
        ]
        upload = self._upload
        piece = None if upload is None else upload.due(now)
        if upload is not None and piece is not None:
            message = CheckpointPiece(
                name=shard,
                incarnation=incarnation,
                job=job,
                checkpoint=self.number,
                part=self._part,
                offset=piece[0],
                total=upload.total,
            )
            errands.append((message, [piece[1]]))
        return errands

    def _missing(self, serving: Serving, now: float) -> list[int]:
        """The blocks to ask for now."""
        if not serving.order.resumes or self.failure:
            return []
        missing = [index for index, block in serving.blocks.items() if not block.is_initialised][:BLOCKS_ASKED]
        self._asked = {block: self._asked.get(block, -inf) for block in missing}
        due = [block for block in missing if now >= self._asked[block]]
        self._asked.update(dict.fromkeys(due, now + AGAIN_SECONDS))
        return due

    def hear(
        self, serving: Serving | None, message: CheckpointStored | KeptBlock, frames: Sequence[memoryview]
    ) -> bool:
        """An answer. Returns whether the coordinator should hear at once of what came of it."""
        if serving is None or serving.order.job != message.job:
            return False
        if isinstance(message, CheckpointStored):
            if self._upload is not None and message.checkpoint == self.number:
                self._upload.heard(message.stored)
                if self._upload.is_complete:
                    self._upload = None  # its memory is as large as the state
            return False
        block = serving.blocks.get(message.block)
        if not serving.order.resumes or block is None or block.is_initialised:
            return False  # a second answer
        try:
            take_block(serving, message.state, message.arrays, frames)
        except ValueError as error:
            self.failure = (
                f"{self._part!r} cannot go on from the checkpoint: {error}; it was taken by another release or for "
                "another job: submit the job without --resume"
            )
            return True
        return all(held.is_initialised for held in serving.blocks.values())
