"""topk: selecting, writing and reading the few largest elements. docs/encodings.md, "Frames".

Selection is exact. A sample of the magnitudes guesses a limit that somewhat more than k elements reach, one
pass collects those, and the k-th largest among them is found by its bits; a bad guess costs only time.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.compiled import inlined, kernel
from paramserver.encoding.memory.kernels import MAGNITUDE, RUN, load, reinterpret, store
from paramserver.encoding.scales.kernels import largest_bits, scale_of_largest

_SAMPLE = 4096
_ROUND = np.float32(12582912.0)  # as in encoding/tiled
_ROUND_BITS = np.int32(0x4B400000)


@inlined
def _bits(value):
    return np.uint32(reinterpret(value, np.uint32) & MAGNITUDE)


@inlined
def _kth_largest(numbers, count, k):
    """The k-th largest of numbers[0 : count], 1 <= k <= count, eight bits at a time from the top."""
    counts = np.empty(256, np.int64)
    prefix, mask = np.uint32(0), np.uint32(0)
    wanted = k
    for shift in range(24, -8, -8):
        counts[:] = 0
        for i in range(count):
            if np.uint32(numbers[i] & mask) == prefix:
                counts[np.uintp(np.uint32(numbers[i] >> np.uint32(shift)) & np.uint32(255))] += 1
        digit = 255
        while counts[digit] < wanted:
            wanted -= counts[digit]
            digit -= 1
        prefix = np.uint32(prefix | np.uint32(np.uint32(digit) << np.uint32(shift)))
        mask = np.uint32(mask | np.uint32(np.uint32(255) << np.uint32(shift)))
    return prefix


@inlined
def _guess(totals, k):
    """A limit that probably somewhat more than k magnitudes reach; 0 is always right."""
    # An odd stride, so that the sample is no column of a matrix.
    stride = max(1, totals.size // _SAMPLE) | 1
    size = (totals.size + stride - 1) // stride
    sample = np.empty(size, np.uint32)
    for i in range(size):
        sample[i] = _bits(totals[i * stride])
    expected = k / stride
    rank = int(expected + 3 * np.sqrt(expected) + 4)
    return _kth_largest(sample, size, rank) if rank <= size else np.uint32(0)


@inlined
def _collect(totals, limit, places):
    """The places of all magnitudes of at least `limit`, ascending, to `places`; returns how many."""
    found = np.uintp(0)
    for i in range(np.uintp(totals.size)):
        # Written always and kept sometimes: a branch would be guessed wrong too often.
        places[found] = np.uint32(i)
        found += np.uintp(_bits(totals[i]) >= limit)
    return np.int64(found)


@inlined
def _select(totals, k, places):
    """The places of the k largest magnitudes, of equals the first, ascending, to the front of `places`."""
    found = _collect(totals, _guess(totals, k), places)
    if found < k:
        found = _collect(totals, np.uint32(0), places)
    magnitudes = np.empty(found, np.uint32)
    for i in range(found):
        magnitudes[i] = _bits(totals[np.uintp(places[i])])
    limit = _kth_largest(magnitudes, found, k)
    above = 0
    for i in range(found):
        above += magnitudes[i] > limit
    equals = k - above
    kept = np.int64(0)
    for i in range(found):
        is_equal = magnitudes[i] == limit and equals > 0
        if magnitudes[i] > limit or is_equal:
            places[kept] = places[i]
            kept += 1
            equals -= is_equal


@inlined
def _write_places(places, k, runs, frame):
    """Counts, low bytes and high places of the kept elements; returns the position after them."""
    for run in range(runs):
        store(frame, 2 * run, np.uint16(0))
    low, high, half = 2 * runs, 2 * runs + k, (k + 1) // 2
    for i in range(half):
        store(frame, high + i, np.uint8(0))
    for i in range(k):
        place = places[i]
        count_at = 2 * np.int64(place // np.uint32(RUN))
        offset = np.uint32(place % np.uint32(RUN))
        store(frame, count_at, np.uint16(load(frame, count_at, np.uint16) + np.uint16(1)))
        store(frame, low + i, np.uint8(offset & np.uint32(255)))
        at, shift = (high + i, 0) if i < half else (high + i - half, 4)
        nibbles = np.uint32(load(frame, at, np.uint8)) | np.uint32(
            np.uint32(offset >> np.uint32(8)) << np.uint32(shift)
        )
        store(frame, at, np.uint8(nibbles))
    return high + half


@inlined
def _write_values(tile, totals, places, k, kept, frame, position):
    """Scales and codes of the kept elements; totals keep the rest."""
    for i in range(k):
        kept[i] = totals[np.uintp(places[i])]
    tiles = (k + tile - 1) // tile
    codes = position + 2 * tiles
    for index in range(tiles):
        first = index * tile
        count = min(tile, k - first)
        bits = np.uint32(scale_of_largest(largest_bits(kept, first, count), np.float32(127)))
        scale = reinterpret(bits, np.float32)
        inverse = np.float32(1) / scale if scale != np.float32(0) else np.float32(0)
        store(frame, position + 2 * index, np.uint16(np.uint32(bits >> np.uint32(16))))
        for i in range(first, first + count):
            rounded = np.float32(np.float32(kept[i] * inverse) + _ROUND)
            code = np.int32(reinterpret(rounded, np.int32) - _ROUND_BITS)
            code = max(np.int32(-127), min(np.int32(127), code))
            store(frame, codes + i, np.int8(code))
            totals[np.uintp(places[i])] = kept[i] - np.float32(code) * scale


@kernel
def encode_topk(k, tile, values, residual, frame):
    """Encode the k largest of values + residual; the residual, which is needed, becomes what the frame lacks."""
    for i in range(np.uintp(values.size)):
        residual[i] += values[i]
    places = np.empty(values.size + 1, np.uint32)
    if k > 0:
        _select(residual, k, places)
    position = _write_places(places, k, (values.size + RUN - 1) // RUN, frame)
    _write_values(tile, residual, places, k, np.empty(k, np.float32), frame, position)


# ------------------------------------------------------------------------------------- reading


@inlined
def kept_elements(frame, elements):
    """How many elements the frame keeps."""
    kept = np.int64(0)
    for run in range((elements + RUN - 1) // RUN):
        kept += np.int64(load(frame, 2 * run, np.uint16))
    return kept


@inlined
def _offset(frame, low, high, half, i):
    shift = np.uint32(0) if i < half else np.uint32(4)
    nibbles = np.uint32(load(frame, high + (i if i < half else i - half), np.uint8))
    upper = np.uint32(np.uint32(nibbles >> shift) & np.uint32(15))
    return np.int64(np.uint32(load(frame, low + i, np.uint8)) | np.uint32(upper << np.uint32(8)))


@inlined
def topk_run(tile, frame, elements, kept, start, count, first, out):
    """The run of `count` elements that begins at `start` to out[0 : count].

    `kept` is that of the frame, `first` is how many the runs before this one keep; returns the same after it.
    """
    runs = (elements + RUN - 1) // RUN
    half = (kept + 1) // 2
    low, high = 2 * runs, 2 * runs + kept
    scales = high + half
    codes = scales + 2 * ((kept + tile - 1) // tile)
    for i in range(np.uintp(count)):
        out[i] = np.float32(0)
    after = first + np.int64(load(frame, 2 * (start // RUN), np.uint16))
    for i in range(first, after):
        offset = _offset(frame, low, high, half, i)
        # A checked frame holds no other; of an unchecked one nothing is written beyond the run.
        if offset < count:
            bits = np.uint32(np.uint32(load(frame, scales + 2 * (i // tile), np.uint16)) << np.uint32(16))
            out[offset] = np.float32(load(frame, codes + i, np.int8)) * reinterpret(bits, np.float32)
    return after


@kernel
def are_places(frame, elements, kept):
    """Whether the offsets of a frame of the right size ascend inside their runs, and the place beyond is zero."""
    runs = (elements + RUN - 1) // RUN
    low, high, half = 2 * runs, 2 * runs + kept, (kept + 1) // 2
    i = 0
    for run in range(runs):
        count = min(RUN, elements - run * RUN)
        previous = -1
        for _ in range(np.int64(load(frame, 2 * run, np.uint16))):
            offset = _offset(frame, low, high, half, i)
            if offset <= previous or offset >= count:
                return False
            previous = offset
            i += 1
    return kept % 2 == 0 or np.uint8(load(frame, high + half - 1, np.uint8) >> np.uint8(4)) == np.uint8(0)
