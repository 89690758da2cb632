"""The table behind docs/errors.md: every message of the package, what provokes it, its cause and its fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from errors.sites import Site, sites


class Row(NamedTuple):
    """One message.

    ``says`` are words of the message that no other has. ``provoke`` gets an empty folder, which is also the current
    one, and raises, warns, logs or returns the message; or it is the name of the test that provokes it, in which the
    words stand.
    """

    says: str
    provoke: Callable[[Path], object] | str
    cause: str
    fix: str


INTRODUCTION = """\
# Errors and warnings

Every message that the package and its recipes can give, with its cause and its fix. `<name>` stands for a value:
`<source>` is where it came from, such as `SadamW`, `SadamW.load_state_dict` or the `optim_args` as they were given. An
error is raised before anything is changed: no parameter, no state, no file.

What you get is an exception of Python, a warning, a line in the log, or, from the `sadam` command, one line with
`error:` and the exit code 2. Messages of torch, transformers, Lightning and jsonargparse that these pass on as they
are are not listed.

This page is written by `make errors` from the tests that provoke each message.
"""


def sections() -> dict[str, list[Row]]:
    """Returns the rows by where the user stands."""
    from errors import command, data, frameworks, optimizer

    return {
        "Building an optimizer": optimizer.BUILDING,
        "Steps": optimizer.STEPPING,
        "Loading a checkpoint": optimizer.LOADING,
        "Hugging Face: the Trainer and `optim_args`": frameworks.OPTIM_ARGS,
        "Hugging Face: `python -m sadam_integrations.launch`": frameworks.LAUNCHER,
        "Lightning": frameworks.LIGHTNING,
        "timm": frameworks.TIMM,
        "The monitors of the adaptive learning rate": frameworks.MONITOR,
        "Advice: `advise` and `sadam calibrate` on checkpoints": frameworks.ADVICE,
        "The `sadam` command": command.COMMAND,
        "Comparing with `sadam compare`": command.COMPARE,
        "Calibrating with `sadam calibrate`": command.CALIBRATE,
        "A recipe's config": command.CONFIG,
        "A run's folder": command.FOLDER,
        "Data: texts": data.TEXT,
        "Data: images": data.IMAGES,
        "The installation": command.INSTALL,
    }


def places(row: Row) -> list[Site]:
    """Returns where a row's message is given: the place with just these words, or those whose message has them."""
    return [site for site in sites() if site.template == row.says] or [s for s in sites() if row.says in s.template]


def page() -> str:
    """Returns docs/errors.md."""
    lines = [INTRODUCTION]
    for title, rows in sections().items():
        lines += [f"## {title}\n", "| message | as | cause | fix |", "|---|---|---|---|"]
        for row in rows:
            site = places(row)[0]
            cells = (f"`{site.template}`", site.told_as, row.cause, row.fix)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
