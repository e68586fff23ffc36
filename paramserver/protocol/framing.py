"""Framing: a message to buffers and back. The only user of msgpack, and the one place where sizes are judged.

A message travels as [head, *frames]: the head is the msgpack of one of `AnyMessage`, the frames are raw
tensor bytes. Whatever a peer sends, `decode_message` returns a checked message or raises FramingError.

Bounds. A head may take half of a message. The largest heads are orders and heartbeats that carry a Layout:
at about 50 bytes a block 4 MiB hold some 80,000 blocks, at the full cut 20 thousand million parameters. A
decoded head takes at most about 30 times its bytes (a tuple of two-byte Wants), so a hostile one costs
120 MB for a moment and no more. Nothing is allocated for a length that is only claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from paramserver.protocol.messages import (
    MESSAGE_TYPES,
    AnyMessage,
    CheckpointPiece,
    ExportPart,
    Initialise,
    KeptBlock,
    KeptState,
    Message,
    Pull,
    Pulled,
    Push,
    Pushed,
    Replicate,
)
from paramserver.protocol.transport import MAX_MESSAGE_BYTES, Buffer

MAX_HEAD_BYTES = MAX_MESSAGE_BYTES // 2
MAX_FRAMES = 4096  # and as many wants, each of which may ask for a frame back
# What senders aim at: one full block of float32. Large enough for the wire, small enough that encoding, transfer and
# applying of a step's messages run side by side; with 4 MiB a model of a million parameters is one message a shard.
CUT_BYTES = MAX_MESSAGE_BYTES // 8
CUT_FRAMES = 1024
_MAX_REASON = 300  # a reason may quote the peer's bytes, and goes back to it in a Refusal


class FramingError(Exception):
    """The peer's fault: bytes that are no message. `reason` is one short line."""

    def __init__(self, reason: str) -> None:
        self.reason = reason if len(reason) <= _MAX_REASON else reason[: _MAX_REASON - 3] + "..."
        super().__init__(self.reason)


class UnsendableError(ValueError):
    """Our fault: a message that every receiver would refuse as malformed."""


# How many frames a message takes; a type that is not named here takes none.
_FRAMES: dict[type[Message], Callable[[Any], int]] = {kind: lambda message: 0 for kind in MESSAGE_TYPES}
_FRAMES[Push] = lambda message: len(message.updates)
_FRAMES[Initialise] = lambda message: len(message.blocks)
_FRAMES[Pulled] = _FRAMES[Pushed] = lambda message: sum([value.frames for value in message.values])
_FRAMES[ExportPart] = _FRAMES[Replicate] = _FRAMES[CheckpointPiece] = _FRAMES[KeptState] = lambda message: 1
_FRAMES[KeptBlock] = lambda message: len(message.arrays)

_WANTING = Push, Pull

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage)


def encode_message(message: Message, frames: Sequence[Buffer] = ()) -> list[Buffer]:
    """The buffers [head, *frames] of a message.

    The frames are the caller's memory, seen as bytes and not copied. Raises UnsendableError when they do not
    fit the message or a bound, TypeError when a frame is not C-contiguous.
    """
    head = _encoder.encode(message)
    buffers: list[Buffer] = [head]
    total = len(head)
    for frame in frames:
        flat = frame if type(frame) is bytes else _flat(frame)
        total += len(flat)
        buffers.append(flat)
    fault = _fault_of_sizes(len(head), len(frames), total) or _fault_of_frames(message, len(frames))
    if fault:
        raise UnsendableError(f"{type(message).__name__}: {fault}; cut it into smaller messages (see batches_by_bytes)")
    return buffers


def decode_message(buffers: Sequence[Buffer]) -> tuple[Message, tuple[memoryview, ...]]:
    """The message and its frames, as read-only views of `buffers` (no copy; they keep the memory alive).

    Raises FramingError, and nothing else, for whatever a peer can send.
    """
    if not buffers:
        raise FramingError("an empty message: there is no head")
    frames = tuple([_read_only(buffer) for buffer in buffers[1:]])
    head = buffers[0]
    fault = _fault_of_sizes(len(head), len(frames), len(head) + sum(map(len, frames)))
    if fault:
        raise FramingError(fault)
    try:
        message: Message = _decoder.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FramingError(f"the head is no message: {error}") from None
    fault = _fault_of_frames(message, len(frames))
    if fault:
        raise FramingError(f"{type(message).__name__}: {fault}")
    return message, frames


def batches_by_bytes(sizes: Iterable[int], limit: int = CUT_BYTES, most: int = CUT_FRAMES) -> list[range]:
    """Cut frames of these sizes (bytes), in order, into messages of at most `limit` bytes and `most` frames.

    Returns the index ranges, none empty. A frame larger than the limit travels alone.
    """
    batches: list[range] = []
    start = end = held = 0
    for size in sizes:
        if end > start and (held + size > limit or end - start >= most):
            batches.append(range(start, end))
            start, held = end, 0
        held += size
        end += 1
    if end > start:
        batches.append(range(start, end))
    return batches


def _fault_of_sizes(head_bytes: int, frames: int, message_bytes: int) -> str:
    if head_bytes > MAX_HEAD_BYTES:
        return f"the head has {head_bytes} bytes; allowed are {MAX_HEAD_BYTES}"
    if frames > MAX_FRAMES:
        return f"the message has {frames} frames; allowed are {MAX_FRAMES}"
    if message_bytes > MAX_MESSAGE_BYTES:
        return f"the message has {message_bytes} bytes; allowed are {MAX_MESSAGE_BYTES}"
    return ""


def _fault_of_frames(message: Message, frames: int) -> str:
    expected = _FRAMES[type(message)](message)
    if frames != expected:
        return f"found {frames} frames where its fields say {expected}"
    if isinstance(message, _WANTING) and len(message.wants) > MAX_FRAMES:
        return f"it wants {len(message.wants)} blocks; allowed are {MAX_FRAMES}"
    return ""


def _flat(frame: Buffer) -> Buffer:
    view = memoryview(frame)
    # A view without elements cannot be cast.
    return view.cast("B") if view.nbytes else b""


def _read_only(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view if view.readonly else view.toreadonly()
