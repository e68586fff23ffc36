"""Low-resolution encodings: one file a member, one interface, compiled kernels."""

from paramserver.encoding import (  # noqa: F401 - each registers itself in the family
    adaptive,
    bf16,
    coded,
    fp4,
    fp32,
    int2,
    int4,
    int8,
    sign,
    ternary,
    topk,
)
from paramserver.encoding.arrays import aligned_zeros
from paramserver.encoding.base import (
    DEFAULT_TILE,
    Encoding,
    EncodingError,
    EncodingOptions,
    encoding_names,
    make_encoding,
    parse_encoding,
)
from paramserver.encoding.member import warm_up

__all__ = [
    "DEFAULT_TILE",
    "Encoding",
    "EncodingError",
    "EncodingOptions",
    "aligned_zeros",
    "encoding_names",
    "make_encoding",
    "parse_encoding",
    "warm_up",
]
