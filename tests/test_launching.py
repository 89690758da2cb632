"""docs/launching.md: its commands are ones that their programs take, and two machines are stood for by two agents."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import HfArgumentParser, TrainingArguments

import sadam_integrations.huggingface  # noqa: F401

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "scripts" / "two_nodes.py"
TEXT = (ROOT / "docs" / "launching.md").read_text()
LAUNCHERS = r"^(?:srun )?((?:torchrun|accelerate|deepspeed) .*)$"
COMMANDS = {
    command: shlex.split(command.replace("$SLURM_NNODES", "2"))
    for command in re.findall(LAUNCHERS, TEXT.replace("\\\n", " "), re.MULTILINE)
}
RUNNABLE = [command for command in COMMANDS if "--machine_rank" in command or "--node-rank" in command]


def split(words):
    """The parsed arguments of the launcher, and what it would run."""
    if words[0] == "torchrun":
        args = get_args_parser().parse_args(words[1:])
    elif words[0] == "accelerate":
        args = launch_command_parser().parse_args(words[2:])
    else:
        args = pytest.importorskip("deepspeed.launcher.runner").parse_args(words[1:])
        args.training_script, args.training_script_args = args.user_script, args.user_args
    return args, args.training_script, args.training_script_args


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_its_program_takes(command):
    args, program, rest = split(COMMANDS[command])
    assert bool(args.module) == (program == "sadam_integrations.launch")
    script, rest = (rest[0], rest[1:]) if args.module else (program, rest)
    assert script == ("run_glue.py" if args.module else "train.py")
    if "--deepspeed" in rest:
        at = rest.index("--deepspeed")
        assert f'`TrainingArguments(deepspeed="{rest[at + 1]}"' in TEXT
        rest = rest[:at] + rest[at + 2 :]
    (options,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(rest)
    assert options.optim == "sadamw"


def test_the_deepspeed_configuration_is_json():
    (block,) = re.findall(r"^```json\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert json.loads(block)["zero_optimization"] == {"stage": 2}


def test_the_slurm_script_is_bash(tmp_path):
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in RUNNABLE if "sadam_integrations.launch" in c])
def test_two_agents_are_two_machines(command, tmp_path):
    """The page's own command, with one process a machine, on this one."""
    words = command.replace("node0", "127.0.0.1").replace("29500", str(free_port())).replace("run_glue.py", str(SCRIPT))
    words = words.replace("--nproc-per-node 8", "--nproc-per-node 1").replace("--num_processes 16", "--num_processes 2")
    quiet = ["--report_to", "none", "--save_strategy", "no", "--use_cpu", "--ddp_backend", "gloo", "--max_steps", "2"]
    agents = []
    for rank in range(2):
        line = shlex.split(re.sub(r"(node-rank|machine_rank) 0", rf"\1 {rank}", words))
        program = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}[line[0]]
        line = line[2 if line[0] == "accelerate" else 1 :]
        agents.append(
            subprocess.Popen(
                [sys.executable, "-m", program, *line, *quiet, "--output_dir", tmp_path / str(rank)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        output = [agent.communicate(timeout=200)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(output)[-4000:]
    seen = json.loads((tmp_path / "0" / "seen.json").read_text())
    assert seen == {"processes": 2, "here": "1", "steps": 2, "optimizer": "SadamW"}
    assert not (tmp_path / "1" / "seen.json").exists()  # it belongs to the same run
