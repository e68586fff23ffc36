"""The export of one job: the parts of model.safetensors, stored in order, whoever sends them."""

from __future__ import annotations

from paramserver.coordinator.effects import Effect, SealModel, StorePart
from paramserver.protocol.messages import ExportPart


class ModelExport:
    """How much of the model is stored. `is_complete` may be known from an earlier coordinator."""

    def __init__(self, job_id: str, is_complete: bool) -> None:
        self.is_complete = is_complete
        self.stored = 0  # bytes, from the start on, under the lease that sends now
        self._job_id = job_id
        self._lease = -1

    def take(self, part: ExportPart, data: memoryview) -> list[Effect]:
        """What to store of a part; nothing where it is not the next one. Another lease begins the file anew."""
        if part.lease != self._lease:
            self._lease, self.stored = part.lease, 0
        size = len(data)
        if self.is_complete or part.offset != self.stored or not size or part.offset + size > part.total:
            return []
        effects: list[Effect] = [StorePart(self._job_id, part.offset, data)]
        self.stored += size
        if self.stored == part.total:
            self.is_complete = True
            effects.append(SealModel(self._job_id))
        return effects
