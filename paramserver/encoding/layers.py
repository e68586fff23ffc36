"""Which encoding each block of a layout uses: the job's, but for layers that the user or common sense treats apart.

Norms and biases are few, and what rounding does to them shows in every output: parameters of one dimension go at
full precision unless a rule names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from paramserver.encoding.base import Encoding, EncodingOptions, make_encoding
from paramserver.protocol.layout import Layout

FULL_PRECISION = "fp32"


def encodings_by_block(
    layout: Layout, default: str, options: EncodingOptions, rules: Mapping[str, str]
) -> tuple[Encoding, ...]:
    """The encoding of every block (blocks,).

    `rules` are pattern -> encoding name, in order; the first pattern that matches a parameter's name or its group
    decides (`*` and `?` as in file names).
    """
    made = {name: layer_encoding(name, options) for name in (default, FULL_PRECISION, *rules.values())}
    chosen: dict[str, Encoding] = {}
    for parameter in layout.parameters:
        matching = (name for pattern, name in rules.items() if _matches(pattern, parameter.name, parameter.group))
        implied = FULL_PRECISION if len(parameter.shape) < 2 else default
        chosen[parameter.name] = made[next(matching, implied)]
    return tuple(chosen[block.parameter] for block in layout.blocks)


def unmatched(layout: Layout, rules: Mapping[str, str]) -> list[str]:
    """The patterns that no parameter of the layout matches: most likely misspelt."""
    return [
        pattern
        for pattern in rules
        if not any(_matches(pattern, parameter.name, parameter.group) for parameter in layout.parameters)
    ]


def _matches(pattern: str, name: str, group: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(group, pattern)


def layer_encoding(name: str, options: EncodingOptions) -> Encoding:
    """The encoding with the job's options, as far as it has them."""
    # An option that is for the job's encoding does not bar another one from a layer.
    plain = EncodingOptions(tile=options.tile, density=options.density)
    try:
        return make_encoding(name, options)
    except ValueError:
        return make_encoding(name, plain)
