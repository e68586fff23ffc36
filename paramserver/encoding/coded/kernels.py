"""Compiled kernels of `coded`: rounding to one common step, and range coding of the codes (rANS, four states).

A code is an int8; scratch arrays hold whole segments. A state is a number of 31 bits: at least 2^15, and whenever it
would fall below, the next 16-bit word of the frame is taken in. The coder works backwards, so that the decoder,
which has less time, reads forwards. Decoding trusts nothing: states, words and symbols of any bytes stay inside
their arrays, and a frame counts as whole only where its words end with it and its states where coding began.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import numpy as np

from paramserver.encoding.coded.constants import (
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
from paramserver.encoding.memory.kernels import load, store

LARGEST_CODE = 127
STATE_BYTES = 4 * STATES

_SHARES, _EXCESSES, _SPREADS = len(SHARES), len(EXCESSES), len(SPREADS)
_FIRST_SINGLE = 1 + _SHARES * _EXCESSES
_BITS = np.uint64(PROBABILITY_BITS)
_SLOT = np.uint64((1 << PROBABILITY_BITS) - 1)
_WHOLE = np.uint64(1 << PROBABILITY_BITS)
_SYMBOL = np.uint64(0xFF)
_LOWEST = np.uint64(1 << 15)
_INVERSE_BITS = np.uint64(43)
# A byte of its own is coded as one of 256 symbols of equal frequency.
_BYTE_MARK = np.uint64(16 << PROBABILITY_BITS)
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
def _put(state, mark, inverse):
    """Put a symbol into a state: (state, a word, 1 where the word goes out and 0 where it does not).

    No array comes in: numba would count its references in the innermost loop.
    """
    frequency = mark >> _BITS
    # A branch would be guessed wrong too often.
    is_full = np.uint64(state >= frequency << np.uint64(19))
    word = np.uint16(state & np.uint64(0xFFFF))
    state = state >> (is_full << np.uint64(4))
    # state x inverse stays below 2^63, and is exact enough: the state is below 2^19 x frequency.
    quotient = (state * inverse) >> _INVERSE_BITS
    return state + (mark & _SLOT) + quotient * (_WHOLE - frequency), word, np.intp(is_full)


@kernel
def _put_codes(state, second, first, is_pair, words, at):
    """Put the codes that follow an escape. Returns (state, place of the next word)."""
    for turn in range(2 if is_pair else 1):
        code = second if is_pair and turn == 0 else first
        mark = _BYTE_MARK | np.uint64(np.int64(code) + 128) << np.uint64(4)
        state, word, is_full = _put(state, mark, _BYTE_INVERSE)
        words[at] = word
        at -= is_full
    return state, at


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
def _escape_unknown(symbols, count, marks):
    """What the table has left out goes after an escape."""
    for i in range(count):
        symbol = symbols[np.uintp(i)]
        symbols[np.uintp(i)] = np.uint8(ESCAPE) if marks[np.uintp(symbol)] == 0 else symbol


@inlined
def _single_symbols(codes, start, count, padded, is_raw, firsts, symbols):
    for i in range(padded):
        code = np.int32(codes[np.uintp(start + i)]) if i < count else np.int32(0)
        firsts[np.uintp(i)] = np.int8(code)
        if is_raw:
            symbols[np.uintp(i)] = np.uint8(code + 128)
        else:
            symbols[np.uintp(i)] = np.uint8(code + SINGLE_LARGEST if abs(code) <= SINGLE_LARGEST else ESCAPE)


@kernel
def _code_segment(index, count, firsts, seconds, symbols, marks, inverses, states, words, at):
    """Put a segment's symbols, last one first. Returns the place of the next word."""
    s0, s1, s2, s3 = states[0], states[1], states[2], states[3]
    is_pair, escape = index < _FIRST_SINGLE, np.intp(256 if index == RAW else ESCAPE)
    for group in range(count // STATES - 1, -1, -1):
        i = np.uintp(group * STATES)
        a, b, c, d = (
            np.uintp(symbols[i]),
            np.uintp(symbols[i + np.uintp(1)]),
            np.uintp(symbols[i + np.uintp(2)]),
            np.uintp(symbols[i + np.uintp(3)]),
        )
        if d == escape:
            s3, at = _put_codes(s3, seconds[i + np.uintp(3)], firsts[i + np.uintp(3)], is_pair, words, at)
        s3, word, is_full = _put(s3, np.uint64(marks[d]), inverses[d])
        words[np.uintp(at)] = word
        at -= is_full
        if c == escape:
            s2, at = _put_codes(s2, seconds[i + np.uintp(2)], firsts[i + np.uintp(2)], is_pair, words, at)
        s2, word, is_full = _put(s2, np.uint64(marks[c]), inverses[c])
        words[np.uintp(at)] = word
        at -= is_full
        if b == escape:
            s1, at = _put_codes(s1, seconds[i + np.uintp(1)], firsts[i + np.uintp(1)], is_pair, words, at)
        s1, word, is_full = _put(s1, np.uint64(marks[b]), inverses[b])
        words[np.uintp(at)] = word
        at -= is_full
        if a == escape:
            s0, at = _put_codes(s0, seconds[i], firsts[i], is_pair, words, at)
        s0, word, is_full = _put(s0, np.uint64(marks[a]), inverses[a])
        words[np.uintp(at)] = word
        at -= is_full
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
        if index != RAW:
            _escape_unknown(symbols, padded, marks[index])
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
def _refill(state, word, at):
    """The state with the word taken in where it is low, and the place of the next word."""
    is_low = np.uint64(state < _LOWEST)
    state = (state << (is_low << np.uint64(4))) | (word & (np.uint64(0) - is_low))
    return state, at + (np.intp(is_low) << 1)


@inlined
def _taken(state, slot):
    """The state without the symbol of its slot."""
    return (slot >> np.uint64(20)) * (state >> _BITS) + ((slot >> np.uint64(8)) & _SLOT)


@inlined
def _word(frame, at, last):
    """The word at a byte of the frame. One beyond the last is not read: it shows in the end that words are missing."""
    return np.uint64(load(frame, min(at, last), np.uint16))


@kernel
def _take_codes(i, state, is_pair, firsts, seconds, frame, at, last):
    """The codes that follow an escape, as bytes. Returns (state, place of the next word)."""
    for turn in range(2 if is_pair else 1):
        found = np.int8(np.int64((state & _SLOT) >> np.uint64(4)) - 128)
        if turn == 0:
            firsts[i] = found
        else:
            seconds[i] = found
        state = np.uint64(16) * (state >> _BITS) + (state & np.uint64(15))
        state, at = _refill(state, _word(frame, at, last), at)
    return state, at


@kernel
def _read_symbols(index, count, slots, symbols, firsts, seconds, states, frame, at, last):
    """All symbols of a segment; codes after an escape go to firsts and seconds. Returns the place of the next word."""
    s0, s1, s2, s3 = states[0], states[1], states[2], states[3]
    is_pair, escape = index < _FIRST_SINGLE, np.uint64(256 if index == RAW else ESCAPE)
    for group in range(count // STATES):
        i = np.uintp(group * STATES)
        a = np.uint64(slots[np.uintp(s0 & _SLOT)])
        s0, at = _refill(_taken(s0, a), _word(frame, at, last), at)
        if a & _SYMBOL == escape:
            s0, at = _take_codes(i, s0, is_pair, firsts, seconds, frame, at, last)
        b = np.uint64(slots[np.uintp(s1 & _SLOT)])
        s1, at = _refill(_taken(s1, b), _word(frame, at, last), at)
        if b & _SYMBOL == escape:
            s1, at = _take_codes(i + np.uintp(1), s1, is_pair, firsts, seconds, frame, at, last)
        c = np.uint64(slots[np.uintp(s2 & _SLOT)])
        s2, at = _refill(_taken(s2, c), _word(frame, at, last), at)
        if c & _SYMBOL == escape:
            s2, at = _take_codes(i + np.uintp(2), s2, is_pair, firsts, seconds, frame, at, last)
        d = np.uint64(slots[np.uintp(s3 & _SLOT)])
        s3, at = _refill(_taken(s3, d), _word(frame, at, last), at)
        if d & _SYMBOL == escape:
            s3, at = _take_codes(i + np.uintp(3), s3, is_pair, firsts, seconds, frame, at, last)
        symbols[i], symbols[i + np.uintp(1)] = np.uint8(a & _SYMBOL), np.uint8(b & _SYMBOL)
        symbols[i + np.uintp(2)], symbols[i + np.uintp(3)] = np.uint8(c & _SYMBOL), np.uint8(d & _SYMBOL)
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
