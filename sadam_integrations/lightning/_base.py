"""The base classes of our Lightning callbacks."""

from __future__ import annotations

import importlib


def _callbacks() -> tuple[type, ...]:
    """The class Callback of every Lightning there is: each one's command line accepts none but its own."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    if not found:
        raise ImportError(
            "sadam_integrations.lightning needs Lightning, which is not installed: "
            'pip install "sadam-integrations[lightning]"'
        )
    return tuple(found)
