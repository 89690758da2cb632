"""Starts runs of a recipe for test_kill.py by forking a process that has imported everything: a start in milliseconds.

Each line of its input is a JSON list: the file for what the run prints, which of the run's saves it is to be killed
after the beginning of (0: none), by how many seconds, and the recipe's arguments. It answers with the run's process id
and, when that has ended, with what ``os.waitstatus_to_exitcode`` says.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path

from sadam_integrations import recipe

for module in ("datasets", "evaluate", "matplotlib.figure", "sklearn.metrics", "transformers", "safetensors.torch"):
    importlib.import_module(module)
for module in ("huggingface.training", "lightning.training", "metrics"):
    importlib.import_module(f"sadam_integrations.{module}")


def kill_after(saves: int, seconds: float) -> None:
    """Has the kernel end this process that long after the beginning of a save; no code of the process runs then.

    Lightning begins with a temporary file, the Trainer with a folder for the checkpoint.
    """
    begun: list = []

    def look(event: str, args: tuple) -> None:
        if event == "tempfile.mkstemp":
            begun.append(object())
        elif event == "os.mkdir" and "checkpoint-" in str(args[0]) and args[0] not in begun:
            begun.append(args[0])
        else:
            return
        if len(begun) == saves:
            signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM, whose default is to end the process

    sys.addaudithook(look)


module = recipe.load(Path(sys.argv[1]), "main")
print("ready", flush=True)
for line in sys.stdin:
    output, saves, seconds, *arguments = json.loads(line)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1), os.dup2(handle, 2)
            if saves:
                kill_after(saves, seconds)
            code = module.main(arguments)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
