"""The one error of the data sets. It lives apart from models.task so that data is checked without torch."""

from __future__ import annotations


class DataError(ValueError):
    """Data that is not there or cannot be read: the text says what, where it was sought, how to mend it."""
