"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

BETWEEN = {"sadam_integrations", "torch", "accelerate", "deepspeed", "lightning", "pytorch_lightning", "transformers"}
"""Packages between the user and an optimizer."""


def warn(message: str) -> None:
    """Warns at the nearest line of the stack that is in none of the packages between; else at the caller's."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in BETWEEN:
            warnings.warn(message, stacklevel=level)
            return
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=3)
