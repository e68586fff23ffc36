"""Encoding of all members that have a code for every element."""
