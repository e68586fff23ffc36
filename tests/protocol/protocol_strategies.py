"""Hypothesis strategies for every message, made from the types themselves so that no field can be forgotten."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from paramserver.protocol.messages import (
    MESSAGE_TYPES,
    BlockValue,
    CheckpointPiece,
    ExportPart,
    Initialise,
    KeptBlock,
    KeptState,
    Message,
    Pulled,
    Push,
    Pushed,
    Replicate,
)


def values_of(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Valid values of one field's type, small in length and full in range."""
    match kind:
        case inspect.IntType():
            low = kind.ge if kind.ge is not None else -(2**63)
            high = kind.lt - 1 if kind.lt is not None else 2**64 - 1
            return st.integers(int(low), int(high))
        case inspect.FloatType():
            return st.floats(min_value=kind.ge, allow_nan=False)
        case inspect.StrType():
            return st.text(min_size=kind.min_length or 0, max_size=6)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.VarTupleType():
            return st.lists(values_of(kind.item_type), max_size=3).map(tuple)
        case inspect.DictType():
            return st.dictionaries(values_of(kind.key_type), values_of(kind.value_type), max_size=3)
        case inspect.UnionType():
            return st.one_of(*map(values_of, kind.types))
        case inspect.StructType():
            fields = {field.name: values_of(field.type) for field in kind.fields}
            made = st.builds(kind.cls, **fields)
            if kind.cls is BlockValue:
                return made.map(lambda value: msgspec.structs.replace(value, frames=value.frames % 3))
            return made
    raise NotImplementedError(f"a strategy for {kind}")


def messages_of(kind: type[Message]) -> st.SearchStrategy[Message]:
    return values_of(inspect.type_info(kind))


@st.composite
def framed(draw: st.DrawFn, kind: type[Message]) -> tuple[Message, list[bytes]]:
    """A message with the frames that it takes."""
    message = draw(messages_of(kind))
    count = frames_of(message)
    return message, draw(st.lists(st.binary(max_size=40), min_size=count, max_size=count))


def any_framed() -> st.SearchStrategy[tuple[Message, list[bytes]]]:
    return st.sampled_from(MESSAGE_TYPES).flatmap(framed)


def frames_of(message: Message) -> int:
    match message:
        case Push():
            return len(message.updates)
        case Initialise():
            return len(message.blocks)
        case Pulled() | Pushed():
            return sum(value.frames for value in message.values)
        case ExportPart() | Replicate() | CheckpointPiece() | KeptState():
            return 1
        case KeptBlock():
            return len(message.arrays)
    return 0
