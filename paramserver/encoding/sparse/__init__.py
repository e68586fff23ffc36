"""Encoding and decoding of the few largest elements."""
