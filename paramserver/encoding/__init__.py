"""Low-resolution encodings: one file a member, one interface, compiled kernels."""

from paramserver.encoding.base import (
    DEFAULT_TILE,
    Encoding,
    EncodingError,
    encoding_names,
    make_encoding,
    parse_encoding,
)

__all__ = ["DEFAULT_TILE", "Encoding", "EncodingError", "encoding_names", "make_encoding", "parse_encoding"]
