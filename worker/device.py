"""Where a worker computes, with how many threads and on which memory. A device that was asked for must be there."""

from __future__ import annotations

import ctypes
import os

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


# Of glibc's mallopt(3). Larger pieces than the second are mapped one by one whatever is set.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, LARGEST_BYTES = 256 * 2**20, 32 * 2**20
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let the C allocator of this process keep up to KEPT_BYTES that are freed: the next step asks for them again.

    Left alone, glibc gives the free end of its heap back to the system after a step, and the next one pays a page
    fault every 4 KiB: it depends on what happens to lie at that end whether a process does so. False, and nothing
    changed, where the C library is another one or the user has tuned it.
    """
    if any(name in os.environ for name in _USERS_OWN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(_M_MMAP_THRESHOLD, LARGEST_BYTES))
