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
SETTLING = "int8"  # what the first updates of a model are pushed in
COARSE_BITS = 4  # from here down they are


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


def settling_encoding(encoding: Encoding) -> Encoding:
    """What a model's first updates of a block are pushed in, in place of 4 bits and less; `adaptive` settles by itself.

    An optimizer that divides by past gradients steps at full length where an element moves for the first time. Coarse
    codes leave small elements out until their residual is large, and so spread those steps over the later updates.
    """
    if encoding.bits > COARSE_BITS or encoding.name == "adaptive":
        return encoding
    return make_encoding(SETTLING, EncodingOptions(tile=encoding.tile, rounding=encoding.options.rounding))


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
