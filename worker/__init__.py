"""The worker: a process that trains, and the library that it is made of. `worker.attach` is the way in."""

from worker.attach import Attached, attach

__all__ = ["Attached", "attach"]
