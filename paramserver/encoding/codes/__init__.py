"""The code that a value is rounded to, and the digit that is stored for it."""
