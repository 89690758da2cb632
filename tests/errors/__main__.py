"""Prints docs/errors.md; ``make errors`` writes it."""

from errors import page

print(page(), end="")
