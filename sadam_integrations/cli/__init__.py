"""The ``sadam`` command: a file a verb, and here what they share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sadam_integrations.arguments import did_you_mean
from sadam_integrations.cli import calibrate, compare, cp, env, ls, run
from sadam_integrations.run_folder import RecipeError
from sadam_integrations.version import __version__

DESCRIPTION = """\
Recipes that train with Sadam, SAMSGrad and their peers: run them, copy them, compare optimizers with them.

  sadam ls                                 which recipes there are, and their configs
  sadam run bert --smoke                   try one in seconds, offline
  sadam run vit --help                     every key of a recipe
  sadam run vit --lr 1e-3 --seed 1 --output_dir runs/mine
  sadam cp bert .                          the recipe as a file of your own: sadam run ./bert.py
  sadam compare vit --optimizers adamw sadamw --seeds 3
  sadam calibrate bert                     which beta and learning rate, from a short AdamW run
  sadam env                                versions, devices, and how a step is computed on each
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    Args:
        argv: The words after ``sadam``; by default those of the command line.

    Returns:
        0 if it went well, 1 if a run of a comparison failed, 2 for a mistake, 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="sadam", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-V", "--version", action="version", version=__version__)
    verbs = parser.add_subparsers(metavar="VERB", title="verbs (sadam VERB --help explains each)")
    for module in (ls, run, cp, compare, calibrate, env):
        verb = verbs.add_parser(
            module.__name__.rpartition(".")[2],
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.arguments(verb)
        verb.set_defaults(go=module.go, verb=verb)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no ± shows a question mark
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in verbs.choices:
        print(f"error: unknown verb {words[0]!r}{did_you_mean(words[0], verbs.choices)}", file=sys.stderr)
        return 2
    if odd := [word for word in words if "\0" in word]:
        print(f"error: {odd[0]!r} has a NUL in it, which no name has: remove it", file=sys.stderr)
        return 2
    args, unknown = parser.parse_known_args(words)
    if not hasattr(args, "go"):
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        parser.print_help()
        return 0
    if unknown and args.go not in (compare.go, calibrate.go):
        hint = ": keys come after the recipe's name" if args.go is run.go else ""
        args.verb.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    args.overrides = unknown
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an optimizer of your own, by the dotted path of its module
    try:
        return args.go(args)
    except BrokenPipeError:  # sadam ls | head
        return 0
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
