"""The version, in one place; kept free of imports so that a build can read it."""

__version__ = "0.1.0"
