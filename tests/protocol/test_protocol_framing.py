"""Framing: what is sent arrives equal, and nothing that a peer can send raises anything but FramingError."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from protocol_strategies import any_framed, framed

from paramserver.protocol import messages as module
from paramserver.protocol.framing import (
    CUT_BYTES,
    MAX_FRAMES,
    MAX_HEAD_BYTES,
    FramingError,
    UnsendableError,
    batches_by_bytes,
    decode_message,
    encode_message,
)
from paramserver.protocol.layout import BLOCK_ELEMENTS
from paramserver.protocol.messages import (
    MESSAGE_TYPES,
    BlockUpdate,
    ExportPart,
    Hello,
    Initialise,
    Initialised,
    Message,
    Pull,
    Pulled,
    Push,
    Pushed,
    Refusal,
    Tick,
    Want,
)
from paramserver.protocol.transport import MAX_MESSAGE_BYTES

TICK = Tick(job="j", worker="w", incarnation=1, step=1)


def push(*blocks: int, wants: tuple[Want, ...] = ()) -> Push:
    updates = tuple(BlockUpdate(block, 1, 0, "fp32") for block in blocks)
    return Push(request=1, job="j", term=1, worker="w", incarnation=1, step=1, updates=updates, wants=wants)


def refused(buffers: list[bytes]) -> str:
    with pytest.raises(FramingError) as caught:
        decode_message(buffers)
    return caught.value.reason


def test_every_message_class_is_one_that_the_codec_knows() -> None:
    declared = {
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
    }
    assert declared == set(MESSAGE_TYPES)


@pytest.mark.parametrize("kind", MESSAGE_TYPES, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_message_arrives_equal_to_what_was_sent(kind: type[Message], data: st.DataObject) -> None:
    message, frames = data.draw(framed(kind))
    received, views = decode_message(encode_message(message, frames))
    assert type(received) is kind
    assert received == message
    assert [bytes(view) for view in views] == frames


def test_frames_of_any_element_type_travel_as_bytes_without_a_copy() -> None:
    words = memoryview(bytearray(b"abcdefgh")).cast("I")
    _, frame, nothing = encode_message(push(0, 1), [words, memoryview(b"").cast("f")])
    assert bytes(frame) == b"abcdefgh"
    assert len(nothing) == 0
    words[0] = 0
    assert bytes(frame) == b"\0\0\0\0efgh"


def test_decoded_frames_are_read_only_views_of_the_buffers() -> None:
    buffers = [bytearray(buffer) for buffer in encode_message(push(0), [b"abcd"])]
    _, (frame,) = decode_message(buffers)
    assert frame.readonly
    buffers[1][0] = ord("z")
    assert bytes(frame) == b"zbcd"


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_random_bytes_are_refused_or_a_message(buffers: list[bytes]) -> None:
    try:
        message, frames = decode_message(buffers)
    except FramingError:
        return
    encode_message(message, frames)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_framed(), st.data())
def test_a_truncated_head_is_refused(message_and_frames: tuple[Message, list[bytes]], data: st.DataObject) -> None:
    head, *frames = encode_message(*message_and_frames)
    length = data.draw(st.integers(0, len(head) - 1))
    assert refused([head[:length], *frames])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_framed(), st.data())
def test_flipped_bits_are_refused_or_another_message(
    message_and_frames: tuple[Message, list[bytes]], data: st.DataObject
) -> None:
    head, *frames = encode_message(*message_and_frames)
    changed = bytearray(head)
    for position in data.draw(st.lists(st.integers(0, 8 * len(head) - 1), min_size=1, max_size=4)):
        changed[position // 8] ^= 1 << position % 8
    try:
        message, _ = decode_message([changed, *frames])
    except FramingError:
        return
    encode_message(message, frames)  # what was accepted is a message that may be sent


_TICK_HEAD = msgspec.msgpack.encode(TICK)
_ARRAY_OF_SIX = b"\x96"
HOSTILE = {
    "nothing": b"",
    "arrays within arrays": b"\x91" * 100_000,
    "a skipped field of arrays within arrays": _ARRAY_OF_SIX + _TICK_HEAD[1:] + b"\x91" * 100_000,
    "maps within maps": b"\x96" + _TICK_HEAD[1:] + b"\x81\x01" * 100_000,
    "an array that claims 4 thousand million entries": b"\xdd\xff\xff\xff\xff",
    "a string that claims 4 GB": b"\x95\xa4tick\xdb\xff\xff\xff\xff",
    "text that is no utf-8": b"\x95\xa4tick\xa2\xff\xfe\xa1w\x01\x01",
    "a tag that is no utf-8": b"\x91\xa2\xff\xfe",
    "an unknown type": msgspec.msgpack.encode(["no-such-message"]),
    "a number for a type": msgspec.msgpack.encode([2**63, 1]),
    "a number beyond its range": msgspec.msgpack.encode(["tick", "j", "w", 2**63, 1]),
    "a negative count": msgspec.msgpack.encode(["tick", "j", "w", -1, 1]),
    "an object": msgspec.msgpack.encode({"type": "tick"}),
    "a missing field": msgspec.msgpack.encode(["tick", "j", "w", 1]),
    "an extension type": b"\x95\xa4tick\xd4\x05\x00\xa1w\x01\x01",
    "two messages": _TICK_HEAD * 2,
}


@pytest.mark.parametrize("head", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_head_is_refused(head: bytes) -> None:
    assert len(refused([head])) <= 300


def test_a_reason_does_not_grow_with_what_the_peer_sent() -> None:
    reason = refused([msgspec.msgpack.encode(["x" * 100_000])])
    assert len(reason) <= 300
    Refusal(code="malformed", detail=reason)


def test_unknown_trailing_fields_are_ignored_so_that_messages_can_grow() -> None:
    assert decode_message([_ARRAY_OF_SIX + _TICK_HEAD[1:] + b"\xc0"]) == (TICK, ())


@pytest.mark.parametrize(
    ("message", "frames"),
    [
        (push(0, 1), 1),
        (push(0), 2),
        (TICK, 1),
        (Initialise(request=1, job="j", term=1, layout="x", blocks=(1, 2)), 1),
        (Initialised(request=1), 1),
        (Pulled(request=1, values=(module.BlockValue(0, 1, "deltas", frames=3),)), 2),
        (Pulled(request=1, values=(module.BlockValue(0, 1, "deltas", frames=2**61),) * 3), 0),
        (Pushed(request=1, acknowledged=(), values=(module.BlockValue(0, 1, "deltas", frames=3),)), 2),
        (ExportPart(name="w", incarnation=1, job="j", lease=1, offset=0, total=1), 0),
    ],
)
def test_a_message_with_too_few_or_too_many_frames_is_refused_and_never_sent(message: Message, frames: int) -> None:
    assert "frames" in refused([msgspec.msgpack.encode(message), *[b"x"] * frames])
    with pytest.raises(UnsendableError, match="frames"):
        encode_message(message, [b"x"] * frames)


def test_a_message_above_a_bound_is_refused_and_never_sent() -> None:
    many = push(*range(MAX_FRAMES + 1))
    with pytest.raises(UnsendableError, match=f"allowed are {MAX_FRAMES}"):
        encode_message(many, [b""] * (MAX_FRAMES + 1))
    assert f"allowed are {MAX_FRAMES}" in refused([msgspec.msgpack.encode(many), *[b""] * (MAX_FRAMES + 1)])

    with pytest.raises(UnsendableError, match=f"allowed are {MAX_MESSAGE_BYTES}"):
        encode_message(push(0), [bytes(MAX_MESSAGE_BYTES)])
    assert f"allowed are {MAX_MESSAGE_BYTES}" in refused([msgspec.msgpack.encode(push(0)), bytes(MAX_MESSAGE_BYTES)])

    assert f"allowed are {MAX_HEAD_BYTES}" in refused([bytes(MAX_HEAD_BYTES + 1)])


def test_a_message_that_wants_more_blocks_than_an_answer_can_hold_is_refused() -> None:
    wants = tuple(Want(block) for block in range(MAX_FRAMES + 1))
    pull = Pull(request=1, job="j", term=1, worker="w", incarnation=1, step=1, wants=wants)
    assert "wants" in refused([msgspec.msgpack.encode(pull)])
    assert "wants" in refused([msgspec.msgpack.encode(push(wants=wants))])


def test_a_field_that_breaks_its_constraint_is_refused() -> None:
    assert "length" in refused(
        [msgspec.msgpack.encode(Hello(worker="w" * 129, incarnation=1, job="j", layout="x", part="shard-0"))]
    )


@given(
    st.lists(st.integers(0, 50), max_size=60),
    st.integers(1, 100),
    st.integers(1, 10),
)
def test_batches_cover_all_frames_in_order_within_the_bounds(sizes: list[int], limit: int, most: int) -> None:
    batches = batches_by_bytes(sizes, limit, most)
    assert [index for batch in batches for index in batch] == list(range(len(sizes)))
    for batch, following in zip(batches, [*batches[1:], None], strict=False):
        held = sum(sizes[index] for index in batch)
        assert 0 < len(batch) <= most
        assert held <= limit or len(batch) == 1
        # Greedy: the next frame did not fit any more.
        assert following is None or len(batch) == most or held + sizes[following[0]] > limit


def test_a_full_block_of_float32_fills_a_message() -> None:
    assert CUT_BYTES == 4 * BLOCK_ELEMENTS
    assert batches_by_bytes([CUT_BYTES, CUT_BYTES, 100, 200]) == [range(1), range(1, 2), range(2, 4)]
