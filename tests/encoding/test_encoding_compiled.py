"""Compilation: one variant a kernel, no GIL, and a disk cache that follows every source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paramserver.encoding import EncodingOptions, compiled, encoding_names, kernels, make_encoding, warm_up
from paramserver.encoding.packing import kernels as packing
from paramserver.encoding.scales import kernels as scales
from paramserver.encoding.sparse import kernels as sparse
from paramserver.encoding.tiled import kernels as tiled

ALL = [
    kernels.encode_fp32,
    kernels.encode_bf16,
    kernels.encode_bf16_plain,
    kernels.delta_fp32,
    kernels.delta_bf16,
    kernels.decode,
    kernels.largest_bits32,
    kernels.largest_bits16,
    packing.largest_byte,
    scales.are_scales,
    sparse.encode_topk,
    sparse.are_places,
    *(getattr(tiled, name) for name in dir(tiled) if name.startswith(("encode_", "delta_"))),
]


def test_frames_of_every_origin_share_one_compiled_variant() -> None:
    values = np.ones(100, np.float32)
    stochastic = [EncodingOptions(rounding="stochastic")]
    for name, options in [
        *((name, EncodingOptions()) for name in encoding_names()),
        *((name, one) for one in stochastic for name in ("int8", "int4", "fp4", "int2")),
    ]:
        encoding = make_encoding(name, options)
        warm_up(encoding)
        warm_up(encoding, of_deltas=True)
        size = encoding.frame_bytes(100)
        buffer = bytearray(size + 1)
        room = np.frombuffer(buffer, np.uint8)[1:]
        taken = 1 + encoding.encode(np.frombuffer(values.tobytes(), np.float32), room, values * 0)
        encoding.encode(values, np.empty(size, np.uint8))
        weights, published = np.frombuffer(values.tobytes(), np.float32), np.zeros(100, np.float32)
        encoding.encode_delta(weights, published, np.empty(size, np.uint8), np.empty(100, np.float32))
        for frame in (np.frombuffer(buffer, np.uint8)[1:taken], np.frombuffer(bytes(buffer), np.uint8)[1:taken]):
            encoding.check(frame, 100)
            encoding.decode(frame, np.empty(100, np.float32))
    for kernel in ALL:
        # None where it is called by kernels alone and those were loaded from the disk cache.
        assert len(kernel.signatures) <= 1, kernel


def test_kernels_run_without_the_gil_and_without_fastmath() -> None:
    for kernel in ALL:
        assert kernel.targetoptions["nogil"]
        assert not kernel.targetoptions["fastmath"]


def test_cache_name_changes_with_any_kernel_source_and_its_constants(tmp_path: Path) -> None:
    for room in ("encoding", "shard"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "kernels.py").write_text("a = 1\n")
    before = compiled.source_hash(tmp_path)
    assert compiled.source_hash(tmp_path) == before
    (tmp_path / "encoding" / "kernels.py").write_text("a = 2\n")
    changed = compiled.source_hash(tmp_path)
    assert changed != before
    (tmp_path / "shard" / "constants.py").write_text("b = 1\n")
    assert compiled.source_hash(tmp_path) not in (before, changed)


def test_kernel_outside_a_kernel_file_is_rejected() -> None:
    with pytest.raises(RuntimeError, match=r"kernels\.py"):
        compiled.kernel(lambda x: x)


def run_fresh(script: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    result = subprocess.run(
        [sys.executable, "-c", script], env=kept | environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_second_start_loads_kernels_from_the_users_cache_folder(tmp_path: Path) -> None:
    script = (
        "from paramserver.encoding import kernels, make_encoding\n"
        "import numpy as np\n"
        "make_encoding('bf16').decode(np.zeros(6, np.uint8), np.zeros(3, np.float32))\n"
        "print('hits', sum(kernels.decode.stats.cache_hits.values()))\n"
    )
    assert "hits 0" in run_fresh(script, XDG_CACHE_HOME=str(tmp_path))
    assert "hits 1" in run_fresh(script, XDG_CACHE_HOME=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [f"paramserver-kernels-{compiled.source_hash()}"]


def test_numba_cache_dir_of_the_user_wins(tmp_path: Path) -> None:
    script = "from paramserver.encoding.compiled import cache_folder; print(cache_folder())"
    assert str(tmp_path / "paramserver-kernels-") in run_fresh(script, NUMBA_CACHE_DIR=str(tmp_path))


def test_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    shared = home / f"paramserver-kernels-{compiled.source_hash()}"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    temporary.mkdir()
    script = "from paramserver.encoding.compiled import cache_folder; print(cache_folder())"
    where = {"XDG_CACHE_HOME": str(home), "HOME": "/dev/null", "TMPDIR": str(temporary)}
    assert str(temporary) in run_fresh(script, **where)


def test_no_usable_folder_is_said_once_and_kernels_still_compile() -> None:
    script = (
        "from paramserver.encoding import kernels\n"
        "from paramserver.encoding.compiled import cache_folder\n"
        "print('folder', cache_folder())\n"
        "print('largest', kernels.largest_bits16(__import__('numpy').zeros(2, 'u1'), 1))\n"
    )
    output = run_fresh(script, NUMBA_CACHE_DIR="/dev/null")
    assert "folder None" in output
    assert "largest 0" in output
    assert output.count("kernel-cache-unavailable") == 1


def test_reading_a_job_imports_no_compiler() -> None:
    script = (
        "import sys, paramserver.job; from paramserver.encoding import make_encoding; make_encoding('int8'); "
        "print('numba' in sys.modules)"
    )
    assert "False" in run_fresh(script)
