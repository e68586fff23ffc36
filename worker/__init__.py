"""The worker: a process that trains, and the library that it is made of. `worker.attach` is the way in."""

from worker.attached import Attached, attach

__all__ = ["Attached", "attach"]
