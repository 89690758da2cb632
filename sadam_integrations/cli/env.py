"""``sadam env``: versions, devices, and how a step is computed on each; what to put into a bug report."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import sadam_integrations
from sadam_integrations import backends
from sadam_integrations.recipe import recipes_folder
from sadam_integrations.run_folder import hardware, versions

SUMMARY = "show versions, devices and backends"
DESCRIPTION = "Shows versions, devices, and how an optimizer's step is computed on each. Paste it into a bug report."


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
    print(f"{'a step on a CPU':20}{_on_cpu(machine['threads'])}")
    triton = backends.missing("cuda") or "fused=True takes it"
    print(f"{'a step on a GPU':20}foreach; the Triton kernel is untested on a GPU and off by default ({triton})")
    return 0


def _on_cpu(threads: int) -> str:
    if reason := backends.missing("cpu"):
        return f"for-loop, several times slower than the kernel: {reason}"
    threads = threads if backends.cpu.load().parallel_for else 1  # type: ignore[union-attr]
    return f"kernel ({backends.cpu.instruction_set()}, threads: {threads})"
