"""``python -m sadam_integrations.launch script.py ...``: an unmodified script with the optimizers' names registered."""

from __future__ import annotations

import functools
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing import spawn
from typing import Any

HELP = """\
usage: python -m sadam_integrations.launch [--monitor | --timm] SCRIPT [arguments of the script ...]
       python -m sadam_integrations.launch [--monitor | --timm] -m MODULE [arguments of the module ...]

Runs a script or module that uses the Hugging Face Trainer, unmodified, with the optimizers of this package among
the names it knows: --optim sadam, samsgrad, sadamw or samsgradw.

  python -m sadam_integrations.launch run_glue.py --optim sadamw --weight_decay 0.01 --optim_args beta=50 ...

With several processes, it goes behind the program that starts them (in front of it, the processes would not know
the names):

  torchrun --nproc-per-node 2 -m sadam_integrations.launch run_glue.py --optim sadamw ...
  accelerate launch -m sadam_integrations.launch run_glue.py --optim sadamw ...

With --monitor, in front of the script or of -m, every Trainer also logs the adaptive learning rates of its optimizer,
which may be any of Adam's kind, each time that it logs the loss:

  python -m sadam_integrations.launch --monitor run_glue.py --optim adamw_torch --report_to tensorboard ...
  torchrun --nproc-per-node 2 -m -- sadam_integrations.launch --monitor run_glue.py --optim sadamw ...

(torchrun has options that begin like --monitor: the -- in front of the module says that those behind it are not its.)

A program that itself starts accelerate's launcher, as TRL's does, or Python processes (torch.multiprocessing.spawn, a
ProcessPoolExecutor), needs nothing more: the processes that it starts are told the names.

  python -m sadam_integrations.launch -m trl.cli.main sft --optim sadamw --optim_args beta=1000 ...

With --timm it is timm's names that are registered, in place of the Trainer's:

  python -m sadam_integrations.launch --timm train.py --opt sadamw --opt-kwargs beta=50 ...

A script that you may edit does not need this: one line, import sadam_integrations.huggingface, does the same, and
Trainer(callbacks=[sadam_integrations.huggingface.ALRCallback()]) is the monitor.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Registers the names with transformers and runs a script or module as Python itself would.

    Args:
        argv: The script and its arguments, or ``-m``, a module and its arguments, with or without ``--monitor`` or
            ``--timm`` in front; by default those of the command line.

    Raises:
        SystemExit: With a message if the command line is wrong or what it needs is missing, or from the script.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return
    option = argv.pop(0) if argv[:1] in (["--monitor"], ["--timm"]) else None
    as_module = argv[:1] == ["-m"]
    argv = argv[as_module:]
    if not argv:
        _fail(f"no {'module' if as_module else 'script'} to run is given")
    if argv[0] in ("--monitor", "--timm"):
        _fail(f"{argv[0]} is given alone and once, in front of the script or of -m")
    if argv[0].startswith("-"):
        _fail(f"{argv[0]} comes before the script: the script's own options go after its name")
    if not as_module and not os.path.exists(argv[0]):
        _fail(f"there is no script {argv[0]!r} in {os.getcwd()!r}; a module is run with -m")
    if not as_module and os.path.isdir(argv[0]) and not os.path.exists(os.path.join(argv[0], "__main__.py")):
        _fail(f"{argv[0]!r} is a folder without a __main__.py")
    if as_module and not _can_be_run(argv[0]):
        _fail(f"there is no module {argv[0]!r} that can be run; a script is run without -m")

    try:
        register(option)
    except ImportError as error:
        sys.exit(f"sadam_integrations.launch: {error}")
    _hand_on_to_spawned(option)
    if option != "--timm" and importlib.util.find_spec("accelerate"):
        _hand_on_to_accelerate([option] if option else [])

    sys.argv = argv  # runpy makes argv[0] the path of the script: HfArgumentParser looks for <script>.args there
    if as_module:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        return
    if not getattr(sys.flags, "safe_path", False):  # python -P puts no folder first in the path, so none is replaced
        sys.path[0] = os.path.dirname(os.path.realpath(argv[0]))
    runpy.run_path(os.path.abspath(argv[0]), run_name="__main__")


def register(option: str | None) -> None:
    """Registers the names, as the launcher's option says."""
    if option == "--timm":
        import sadam_integrations.timm
    else:
        import sadam_integrations.huggingface
    if option == "--monitor":
        from transformers import trainer

        # in front of the callbacks of report_to, which then see the numbers
        trainer.DEFAULT_CALLBACKS.append(sadam_integrations.huggingface.ALRCallback)  # type: ignore[arg-type]


def _can_be_run(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:  # a package
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ImportError as error:
        if error.name and not module.startswith(error.name):  # it is there, and lacks something
            raise
        return False
    except ValueError:  # ""
        return False
    return spec is not None


class _Registration:
    """Registers the names in the process that unpickles it."""

    def __init__(self, option: str | None) -> None:
        self.option = option

    def __reduce__(self) -> tuple:
        from sadam_integrations import launch  # by its name: here it is __main__

        return launch.register, (self.option,)


def _hand_on_to_spawned(option: str | None) -> None:
    """Puts the registration into what every process that is spawned is told before it begins."""
    original = spawn.get_preparation_data

    @functools.wraps(original)
    def get_preparation_data(name: str) -> dict[str, Any]:
        return {**original(name), __spec__.name: _Registration(option)}

    spawn.get_preparation_data = get_preparation_data


def _hand_on_to_accelerate(options: list[str]) -> None:
    """Puts this launcher in front of every script that the program runs by accelerate's launcher."""
    from accelerate.commands import launch

    original = launch.launch_command

    @functools.wraps(original)
    def launch_command(args: Any) -> Any:
        if not (args.no_python or args.training_script == __spec__.name):  # not for Python to run, or ours already
            as_module = ["-m"] if args.module else []
            args.training_script_args = [*options, *as_module, args.training_script, *args.training_script_args]
            args.module, args.training_script = True, __spec__.name
        return original(args)

    launch.launch_command = launch_command


def _fail(message: str) -> None:
    print(f"{HELP}\nsadam_integrations.launch: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
