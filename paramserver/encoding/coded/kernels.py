"""Compiled kernels of `coded`: rounding to one common step, and range coding of the codes (rANS, four states).

A code is an int8; scratch arrays hold whole segments. A state is a number of 31 bits: at least 2^15, and whenever it
would fall below, the next 16-bit word of the frame is taken in. The coder works backwards, so that the decoder,
which has less time, reads forwards. Decoding trusts nothing: states, words and symbols of any bytes stay inside
their arrays, and a frame counts as whole only where its words end with it and its states where coding began.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.coded.classes import (
    ALL_ZERO,
    CLASSES,
    ESCAPE,
    EXCESSES,
    PAIR_LARGEST,
    PAIR_SIDE,
    PROBABILITY_BITS,
    RAW,
    SEGMENT,
    SHARES,
    SINGLE_LARGEST,
    SPREADS,
    STATES,
)
from paramserver.encoding.compiled import inlined, kernel
from paramserver.encoding.kernels import load, store

LARGEST_CODE = 127
STATE_BYTES = 4 * STATES

_SHARES, _EXCESSES, _SPREADS = len(SHARES), len(EXCESSES), len(SPREADS)
_FIRST_SINGLE = 1 + _SHARES * _EXCESSES
_BITS = np.uint64(PROBABILITY_BITS)
_SLOT = np.uint64((1 << PROBABILITY_BITS) - 1)
_WHOLE = np.uint64(1 << PROBABILITY_BITS)
_LOWEST = np.uint64(1 << 15)
_INVERSE_BITS = np.uint64(43)
# A byte of its own is coded as one of 256 symbols of equal frequency.
_BYTE_MARK_BITS = np.uint64(4)
_BYTE_FREQUENCY = np.uint64(16)
_BYTE_INVERSE = np.uint64(1 << 39)
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and taking it off rounds to an integer, half to even
_LARGEST = np.float32(LARGEST_CODE)
_LANES = 16


# ------------------------------------------------------------------------------------ rounding


@inlined
def _code_of(total, inverse, dead_zone):
    """The code as a float32: total x inverse rounded half to even, zero within the dead zone, at most 127."""
    scaled = total * inverse
    limited = scaled if scaled < _LARGEST else _LARGEST
    limited = limited if limited > -_LARGEST else -_LARGEST
    rounded = (limited + _ROUND) - _ROUND
    return rounded if abs(scaled) > dead_zone else np.float32(0)


@inlined
def _squares(totals, count, lanes):
    """lanes (16,) += the squares of totals[:count], element i to lane i mod 16."""
    for start in range(0, count - count % _LANES, _LANES):
        for lane in range(_LANES):
            value = np.float64(totals[np.uintp(start + lane)])
            lanes[lane] += value * value
    for i in range(count - count % _LANES, count):
        value = np.float64(totals[np.uintp(i)])
        lanes[i % _LANES] += value * value


@kernel
def sum_of_squares(values, taken):
    """Of values - taken, in float64."""
    lanes, totals = np.zeros(_LANES, np.float64), np.empty(SEGMENT, np.float32)
    for start in range(0, values.size, SEGMENT):
        count = min(SEGMENT, values.size - start)
        for i in range(count):
            totals[np.uintp(i)] = values[np.uintp(start + i)] - taken[np.uintp(start + i)]
        _squares(totals, count, lanes)
    return lanes.sum()


@kernel
def quantise(values, residual, step, dead_zone, codes):
    """Codes of values + residual; the residual becomes what they do not hold. Returns the sum of squares."""
    inverse = np.float32(1) / step if step > np.float32(0) else np.float32(0)
    lanes = np.zeros(_LANES, np.float64)
    for start in range(0, values.size, SEGMENT):
        count = min(SEGMENT, values.size - start)
        for i in range(start, start + count):
            residual[np.uintp(i)] += values[np.uintp(i)]
        _squares(residual[start : start + count], count, lanes)
        for i in range(start, start + count):
            total = residual[np.uintp(i)]
            code = _code_of(total, inverse, dead_zone)
            codes[np.uintp(i)] = np.int8(code)
            residual[np.uintp(i)] = total - code * step
    return lanes.sum()


@kernel
def quantise_delta(weights, published, step, dead_zone, codes):
    """Codes of weights - published; published gets what a decoder will add. Returns the sum of squares."""
    inverse = np.float32(1) / step if step > np.float32(0) else np.float32(0)
    lanes, totals = np.zeros(_LANES, np.float64), np.empty(SEGMENT, np.float32)
    for start in range(0, weights.size, SEGMENT):
        count = min(SEGMENT, weights.size - start)
        for i in range(count):
            totals[np.uintp(i)] = weights[np.uintp(start + i)] - published[np.uintp(start + i)]
        _squares(totals, count, lanes)
        for i in range(count):
            code = _code_of(totals[np.uintp(i)], inverse, dead_zone)
            codes[np.uintp(start + i)] = np.int8(code)
            published[np.uintp(start + i)] += code * step
    return lanes.sum()


@kernel
def spread_codes(codes, step, out):
    """out = code x step, exact: 7 bits by 8."""
    for i in range(out.size):
        out[np.uintp(i)] = np.float32(codes[np.uintp(i)]) * step


@kernel
def add_codes(codes, step, out):
    """out += code x step."""
    for i in range(out.size):
        out[np.uintp(i)] += np.float32(codes[np.uintp(i)]) * step


# ------------------------------------------------------------------------------------- classes


@inlined
def _level(limits, found):
    level = 0
    while level < limits.size and found > limits[level]:
        level += 1
    return level


@inlined
def class_of(codes, start, count, limits):
    """The class whose assumption is nearest to the codes [start, start + count)."""
    used, total, large = np.int32(0), np.int32(0), np.int32(0)
    for i in range(start, start + count):
        magnitude = abs(np.int32(codes[np.uintp(i)]))
        used += np.int32(magnitude > 0)
        total += magnitude
        large += np.int32(magnitude > PAIR_LARGEST)
    if used == 0:
        return ALL_ZERO
    share_limits, excess_limits, spread_limits = limits
    if 64 * np.int64(large) <= count:
        share = _level(share_limits, (np.int64(used) << 16) // count)
        excess = _level(excess_limits, (np.int64(total - used) << 16) // np.int64(total))
        return 1 + share * _EXCESSES + excess
    return _FIRST_SINGLE + _level(spread_limits, 256 * np.int64(total) // count)


@inlined
def _symbol_count(index, count):
    """How many symbols a segment of `count` elements has in this class: whole rounds of all states."""
    elements = (count + 1) // 2 if index < _FIRST_SINGLE else count
    return (elements + STATES - 1) // STATES * STATES


# -------------------------------------------------------------------------------------- coding


@inlined
def _put(state, frequency, first, inverse, words, at):
    """Put a symbol into a state; a word goes out before it would overflow. Returns (state, place of the next word)."""
    is_full = state >= frequency << np.uint64(19)
    words[at] = np.uint16(state & np.uint64(0xFFFF))
    at -= np.intp(is_full)
    state = state >> np.uint64(16) if is_full else state
    # state x inverse stays below 2^63, and is exact enough: the state is below 2^19 x frequency.
    quotient = (state * inverse) >> _INVERSE_BITS
    return state + first + quotient * (_WHOLE - frequency), at


@inlined
def _put_byte(state, code, words, at):
    first = np.uint64(np.int64(code) + 128) << _BYTE_MARK_BITS
    return _put(state, _BYTE_FREQUENCY, first, _BYTE_INVERSE, words, at)


@inlined
def _put_symbol(state, symbol, marks, inverses, first_code, second_code, is_pair, words, at):
    """Put a symbol, or the escape and its codes where the table has left it out."""
    mark = np.uint64(marks[symbol])
    if mark == np.uint64(0) or symbol == ESCAPE:
        if is_pair:
            state, at = _put_byte(state, second_code, words, at)
        state, at = _put_byte(state, first_code, words, at)
        symbol = ESCAPE
        mark = np.uint64(marks[symbol])
    return _put(state, mark >> _BITS, mark & _SLOT, inverses[symbol], words, at)


@inlined
def _pair_symbols(codes, start, count, pairs, firsts, seconds, symbols):
    """Element i and element i + pairs make a symbol; elements that do not exist are zero."""
    for i in range(pairs):
        firsts[np.uintp(i)] = codes[np.uintp(start + i)] if i < count else np.int8(0)
        seconds[np.uintp(i)] = codes[np.uintp(start + pairs + i)] if pairs + i < count else np.int8(0)
    for i in range(pairs):
        first, second = np.int32(firsts[np.uintp(i)]), np.int32(seconds[np.uintp(i)])
        symbol = (first + PAIR_LARGEST) * PAIR_SIDE + second + PAIR_LARGEST
        is_small = max(abs(first), abs(second)) <= PAIR_LARGEST
        symbols[np.uintp(i)] = np.uint8(symbol) if is_small else np.uint8(ESCAPE)


@inlined
def _single_symbols(codes, start, count, padded, is_raw, firsts, symbols):
    for i in range(padded):
        code = np.int32(codes[np.uintp(start + i)]) if i < count else np.int32(0)
        firsts[np.uintp(i)] = np.int8(code)
        if is_raw:
            symbols[np.uintp(i)] = np.uint8(code + 128)
        else:
            symbols[np.uintp(i)] = np.uint8(code + SINGLE_LARGEST if abs(code) <= SINGLE_LARGEST else ESCAPE)


@inlined
def _code_segment(index, count, firsts, seconds, symbols, marks, inverses, states, words, at):
    """Put a segment's symbols, last one first. Returns the place of the next word."""
    s0, s1, s2, s3 = states[0], states[1], states[2], states[3]
    is_pair, is_raw = index < _FIRST_SINGLE, index == RAW
    for i in range(count - STATES, -1, -STATES):
        i0, i1, i2, i3 = np.uintp(i), np.uintp(i + 1), np.uintp(i + 2), np.uintp(i + 3)
        if is_raw:
            s3, at = _put_byte(s3, firsts[i3], words, at)
            s2, at = _put_byte(s2, firsts[i2], words, at)
            s1, at = _put_byte(s1, firsts[i1], words, at)
            s0, at = _put_byte(s0, firsts[i0], words, at)
        else:
            s3, at = _put_symbol(s3, symbols[i3], marks, inverses, firsts[i3], seconds[i3], is_pair, words, at)
            s2, at = _put_symbol(s2, symbols[i2], marks, inverses, firsts[i2], seconds[i2], is_pair, words, at)
            s1, at = _put_symbol(s1, symbols[i1], marks, inverses, firsts[i1], seconds[i1], is_pair, words, at)
            s0, at = _put_symbol(s0, symbols[i0], marks, inverses, firsts[i0], seconds[i0], is_pair, words, at)
    states[0], states[1], states[2], states[3] = s0, s1, s2, s3
    return at


@kernel
def code(codes, elements, tables, is_raw, words, frame, position):
    """Write classes, states and words of codes[:elements] to byte `position` of the frame and on.

    `words` is scratch for 2 x SEGMENT words a segment. Returns the frame's bytes, or -1 where it is too small.
    """
    marks, inverses, limits = tables
    firsts, seconds = np.empty(SEGMENT, np.int8), np.empty(SEGMENT, np.int8)
    symbols = np.empty(SEGMENT, np.uint8)
    states = np.full(STATES, _LOWEST, np.uint64)
    segments = (elements + SEGMENT - 1) // SEGMENT
    at, is_used = words.size - 1, False
    for segment in range(segments - 1, -1, -1):
        start = segment * SEGMENT
        count = min(SEGMENT, elements - start)
        index = class_of(codes, start, count, limits)
        index = RAW if is_raw and index != ALL_ZERO else index
        store(frame, position + segment, np.uint8(index))
        if index == ALL_ZERO:
            continue
        is_used = True
        padded = _symbol_count(index, count)
        if index < _FIRST_SINGLE:
            _pair_symbols(codes, start, count, padded, firsts, seconds, symbols)
        else:
            _single_symbols(codes, start, count, padded, index == RAW, firsts, symbols)
        at = _code_segment(index, padded, firsts, seconds, symbols, marks[index], inverses[index], states, words, at)
    position += segments
    if not is_used:
        return position
    found = words.size - 1 - at
    if position + STATE_BYTES + 2 * found > frame.size:
        return -1
    for k in range(STATES):
        store(frame, position + 4 * k, np.uint32(states[k]))
    position += STATE_BYTES
    for i in range(found):
        store(frame, position + 2 * i, words[at + 1 + i])
    return position + 2 * found


# ------------------------------------------------------------------------------------ decoding


@inlined
def _refill(state, frame, at, last):
    """The state with a word taken in where it is low, and the place of the next word.

    A place beyond the last word is not read: the caller finds that the words ended too early.
    """
    word = np.uint64(load(frame, min(at, last), np.uint16))
    is_low = state < _LOWEST
    state = (state << np.uint64(16)) | word if is_low else state
    return state, at + (np.intp(is_low) << 1)


@inlined
def _take(state, slots, frame, at, last):
    """The next symbol of a state: (symbol, state, place of the next word)."""
    slot = np.uint64(slots[np.uintp(state & _SLOT)])
    state = (slot >> np.uint64(20)) * (state >> _BITS) + ((slot >> np.uint64(8)) & _SLOT)
    state, at = _refill(state, frame, at, last)
    return np.uint8(slot & np.uint64(0xFF)), state, at


@inlined
def _take_byte(state, frame, at, last):
    """The next code that was put as a byte."""
    found = np.int64((state & _SLOT) >> _BYTE_MARK_BITS) - 128
    state = _BYTE_FREQUENCY * (state >> _BITS) + (state & np.uint64(15))
    state, at = _refill(state, frame, at, last)
    return np.int8(found), state, at


@inlined
def _take_codes(i, state, is_pair, firsts, seconds, frame, at, last):
    """The codes after an escape."""
    first, state, at = _take_byte(state, frame, at, last)
    firsts[np.uintp(i)] = first
    if is_pair:
        second, state, at = _take_byte(state, frame, at, last)
        seconds[np.uintp(i)] = second
    return state, at


@inlined
def _read_symbols(index, count, slots, symbols, firsts, seconds, states, frame, at, last):
    """All symbols of a segment; codes after an escape go to firsts and seconds. Returns the place of the next word."""
    s0, s1, s2, s3 = states[0], states[1], states[2], states[3]
    is_pair, is_raw = index < _FIRST_SINGLE, index == RAW
    for i in range(0, count, STATES):
        a, s0, at = _take(s0, slots, frame, at, last)
        if a == ESCAPE and not is_raw:
            s0, at = _take_codes(i, s0, is_pair, firsts, seconds, frame, at, last)
        b, s1, at = _take(s1, slots, frame, at, last)
        if b == ESCAPE and not is_raw:
            s1, at = _take_codes(i + 1, s1, is_pair, firsts, seconds, frame, at, last)
        c, s2, at = _take(s2, slots, frame, at, last)
        if c == ESCAPE and not is_raw:
            s2, at = _take_codes(i + 2, s2, is_pair, firsts, seconds, frame, at, last)
        d, s3, at = _take(s3, slots, frame, at, last)
        if d == ESCAPE and not is_raw:
            s3, at = _take_codes(i + 3, s3, is_pair, firsts, seconds, frame, at, last)
        symbols[np.uintp(i)], symbols[np.uintp(i + 1)] = a, b
        symbols[np.uintp(i + 2)], symbols[np.uintp(i + 3)] = c, d
    states[0], states[1], states[2], states[3] = s0, s1, s2, s3
    return at


@inlined
def _codes_of_pairs(symbols, pairs, firsts, seconds):
    for i in range(pairs):
        symbol = np.int32(symbols[np.uintp(i)])
        first = (symbol * 57) >> 9  # symbol // 9 for all below 82
        is_escape = symbol == ESCAPE
        firsts[np.uintp(i)] = firsts[np.uintp(i)] if is_escape else np.int8(first - PAIR_LARGEST)
        second = np.int8(symbol - first * PAIR_SIDE - PAIR_LARGEST)
        seconds[np.uintp(i)] = seconds[np.uintp(i)] if is_escape else second


@inlined
def _codes_of_singles(index, symbols, count, firsts):
    for i in range(count):
        symbol = np.int32(symbols[np.uintp(i)])
        if index == RAW:
            firsts[np.uintp(i)] = np.int8(symbol - 128)
        else:
            firsts[np.uintp(i)] = firsts[np.uintp(i)] if symbol == ESCAPE else np.int8(symbol - SINGLE_LARGEST)


@kernel
def decode(frame, position, elements, all_slots, codes):
    """Decode codes[:elements] from byte `position` of the frame on. True where the frame is whole and well-formed."""
    segments = (elements + SEGMENT - 1) // SEGMENT
    is_used = False
    for segment in range(segments):
        index = load(frame, position + segment, np.uint8)
        if index >= CLASSES:
            return False
        is_used |= index != ALL_ZERO
    classes = position
    position += segments
    if not is_used:
        codes[:elements] = 0
        return position == frame.size
    if position + STATE_BYTES > frame.size:
        return False
    states = np.empty(STATES, np.uint64)
    for k in range(STATES):
        states[k] = np.uint64(load(frame, position + 4 * k, np.uint32))
        if states[k] < _LOWEST or states[k] >= _LOWEST << np.uint64(16):
            return False
    at, last = position + STATE_BYTES, frame.size - 2
    firsts, seconds = np.zeros(SEGMENT, np.int8), np.zeros(SEGMENT, np.int8)
    symbols = np.empty(SEGMENT, np.uint8)
    for segment in range(segments):
        start = segment * SEGMENT
        count = min(SEGMENT, elements - start)
        index = np.intp(load(frame, classes + segment, np.uint8))
        if index == ALL_ZERO:
            codes[start : start + count] = 0
            continue
        padded = _symbol_count(index, count)
        at = _read_symbols(index, padded, all_slots[index], symbols, firsts, seconds, states, frame, at, last)
        if at > frame.size:
            return False
        if index < _FIRST_SINGLE:
            _codes_of_pairs(symbols, padded, firsts, seconds)
            low = min(padded, count)
            codes[start : start + low] = firsts[:low]
            codes[start + low : start + count] = seconds[: count - low]
        else:
            _codes_of_singles(index, symbols, padded, firsts)
            codes[start : start + count] = firsts[:count]
    for k in range(STATES):
        if states[k] != _LOWEST:
            return False
    return at == frame.size
