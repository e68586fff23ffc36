"""Sums of magnitudes in the order that docs/encodings.md writes down."""
