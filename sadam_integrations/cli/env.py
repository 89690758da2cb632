"""``sadam env``: versions, devices, and how a step is computed on each; what to put into a bug report."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import sadam_integrations
from sadam_integrations import Sadam, backends
from sadam_integrations.recipe import recipes_folder
from sadam_integrations.run_folder import hardware, versions

SUMMARY = "show versions, devices and backends"
DESCRIPTION = "Shows versions, devices, and how an optimizer's step is computed on each. Paste it into a bug report."

WHY = {
    ("cpu", "for_loop"): "one tensor after the other in pieces that fit the cache; foreach is slower on a CPU",
    ("cuda", "foreach"): "few launches for many tensors; no run on a GPU has been made yet",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the verb has no arguments."""


def go(args: argparse.Namespace) -> int:
    """Prints the list."""
    machine = hardware()
    for name, version in versions().items():
        print(f"{name:20}{version}")
    print(f"{'package':20}{Path(sadam_integrations.__file__).parent}")
    print(f"{'recipes':20}{recipes_folder()}")
    print(f"{'system':20}{machine['system']}")
    print(f"{'CPU':20}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads for torch")
    other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    print(f"{'GPU':20}{', '.join(machine['gpus']) or other or 'none'}")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        parameter = torch.zeros(1, device=device, requires_grad=True)
        backend = backends.pick([parameter], Sadam([parameter]).param_groups[0]).__name__  # type: ignore[attr-defined]
        print(f"{f'a step on {device}':20}{backend}: {WHY.get((device, backend), '')}")
    print(f"{'fused':20}no kernel in this version: fused=True is an error")
    return 0
