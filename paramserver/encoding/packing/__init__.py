"""Codes of a few bits, packed several a byte."""
