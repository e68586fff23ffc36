"""What the C allocator of a worker process does with memory that a step has freed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from worker.device import keep_freed_memory

STEPS = """
import resource, sys
import numpy as np
from worker.device import keep_freed_memory

print(int(keep_freed_memory() if sys.argv[1] == "keep" else True))

def step():
    arrays = [np.ones(2**17, np.float32) for _ in range(32)]
    while arrays:
        arrays.pop()

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 32 * 2**19 // 4096  # of one step


def run_steps(how: str) -> tuple[bool, int]:
    """(what the call answered, page faults of ten steps) in a fresh process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", STEPS, how], env=own, capture_output=True, text=True, check=True)
    answer, faults = done.stdout.split()
    return bool(int(answer)), int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_memory_that_a_step_has_freed_is_there_for_the_next_one() -> None:
    assert run_steps("leave")[1] > 5 * PAGES, "this machine's allocator would keep it anyway: the test says nothing"
    is_kept, faults = run_steps("keep")
    assert is_kept
    assert faults < PAGES


def test_an_allocator_that_the_user_has_tuned_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not keep_freed_memory()
