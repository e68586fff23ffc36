"""Where a worker computes, and with how many threads. A device that was asked for by name must be there."""

from __future__ import annotations

import torch

from worker.errors import JobFailure


def choose_device(wanted: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:n" means on this machine.

    "auto" is the first CUDA device, or else the CPU. Raises JobFailure when CUDA is asked for and absent.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda", 0) if found else torch.device("cpu")
    name, _, index = wanted.partition(":")
    if name != "cuda" or (index and not index.isdecimal()):
        raise JobFailure(f"device {wanted!r} is not known (allowed: auto, cpu, cuda, cuda:n)")
    if int(index or 0) >= found:
        raise JobFailure(
            f"device {wanted!r} was asked for, but this worker finds {found} CUDA devices; "
            "use device: auto or cpu, or start the worker where the device is"
        )
    return torch.device("cuda", int(index or 0))


def limit_threads(threads: int) -> None:
    """Give this process so many compute threads: several workers on one machine ruin each other otherwise."""
    torch.set_num_threads(threads)
