"""Recipes that are killed: at start-up, amid a step and amid a save, over and over; they end as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

for module in ("jsonargparse", "transformers", "datasets", "evaluate", "lightning"):
    pytest.importorskip(module)
if not hasattr(os, "fork"):
    pytest.skip("needs signals and fork", allow_module_level=True)

from test_recipe import csv_arguments, csv_files, tiny_model  # noqa: E402, F401

from sadam_integrations import recipe  # noqa: E402

TESTS = Path(__file__).parent
KILLS = 10
SEEDS = [0, 1]
WHERE = ["at start-up", "amid training", "amid a save", "amid a save"]


class Runs:
    """One recipe, started again and again in the same folder.

    Args:
        name: The recipe's.
        arguments: Its arguments, without the folder.
        folder: Where the runs' folders are.
        env: Variables of the environment.
    """

    def __init__(self, name, arguments, folder, **env):
        self.recipe, self.arguments, self.folder = recipe.recipes_folder() / f"{name}.py", arguments, folder
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **env}
        self.worker = None

    def start(self, name, saves=0, seconds=0.0):
        """Forks a run from a process that has everything imported; it may be killed that long after a save begins."""
        if self.worker is None:
            self.worker = subprocess.Popen(
                [sys.executable, TESTS / "kill_worker.py", self.recipe],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.env,
            )  # fmt: skip
            assert self.worker.stdout.readline() == "ready\n"
        words = [*self.arguments, "--output_dir", self.folder / name]
        words = [str(self.folder / f"{name}.log"), saves, seconds, *map(str, words)]
        self.worker.stdin.write(json.dumps(words) + "\n")
        self.worker.stdin.flush()
        return int(self.worker.stdout.readline())

    def ended(self, name):
        """Waits for the run that was started last; returns its exit code and what it printed."""
        code = int(self.worker.stdout.readline())
        return code, (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def whole(self, name):
        """Runs to the end, from a checkpoint if there is one; returns what came out."""
        self.start(name)
        code, printed = self.ended(name)
        assert code == 0, printed
        return self.outcome(name)

    def outcome(self, name):
        """What has to be the same, bit for bit."""
        folder = self.folder / name
        result = json.loads((folder / "result.json").read_text())
        weights = (folder / "model" / "model.safetensors").read_bytes()
        return weights, result["metrics"], result["history"], (folder / "alr.jsonl").read_text()

    def kill_at_start(self, name, after):
        """Starts an interpreter of its own, as a user does, and kills it after some seconds."""
        command = [sys.executable, self.recipe, *self.arguments, "--output_dir", self.folder / name]
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self.env
        )
        time.sleep(after)
        process.kill()
        process.wait()

    def half_saved(self, name):
        """Whether a save had begun and was not over when the run was killed."""
        checkpoints = self.folder / name / "checkpoints"
        temporary = list(Path(self.env.get("TMPDIR", tempfile.gettempdir())).glob("tmp*"))
        cut_off = any(not (path / "trainer_state.json").exists() for path in checkpoints.glob("checkpoint-*"))
        half = cut_off or (checkpoints / "next.ckpt").exists() or ("TMPDIR" in self.env and bool(temporary))
        if "TMPDIR" in self.env:
            for path in temporary:
                path.unlink() if path.is_file() else shutil.rmtree(path)
        return half

    def close(self):
        """Ends the worker."""
        if self.worker is not None:
            self.worker.kill()
            self.worker.communicate()


def kill_over_and_over(runs, name, kills, seed):
    """Kills a run that many times, each time after resuming; returns where the kills were, as they turned out."""
    rng, where = random.Random(seed), []
    for i in range(kills):
        aim, killed = WHERE[i % len(WHERE)], -signal.SIGALRM
        if aim == "at start-up" and i % (2 * len(WHERE)) == 0:
            runs.kill_at_start(name, rng.uniform(0.05, 8))
        else:
            if aim == "at start-up":
                process, killed = runs.start(name), -signal.SIGKILL
                time.sleep(rng.uniform(0, 0.8))
                os.kill(process, signal.SIGKILL)
            elif aim == "amid training":
                runs.start(name, 1, rng.uniform(0, 0.5))
            else:
                runs.start(name, rng.randint(1, 2), 10 ** rng.uniform(-4.3, -2.2))
            code, printed = runs.ended(name)
            assert code == killed, f"kill {i}: the run ended by itself with {code}: {printed[-2000:]}"
        half = runs.half_saved(name)
        where.append("amid a save" if half else "between saves" if aim == "amid a save" else aim)
    found = ", ".join(f"{where.count(place)} {place}" for place in sorted(set(where)))
    print(f"{runs.recipe.stem}: {len(where)} kills, seed {seed}: {found}")
    return where


def vit_arguments(epochs):
    settings = {"hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 32, "batch_size": 16, "test_split": "null"}
    settings |= {"dropout": 0.1, "mixup": 0.3, "augment": "crop", "ema": 0.8, "train_size": 160, "eval_size": 50}
    return [word for key, value in {**settings, "epochs": epochs}.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def vit(tmp_path):
    elsewhere = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)  # another file system: a copy
    runs = Runs("vit", [], tmp_path, TMPDIR=elsewhere)
    yield runs
    runs.close()
    shutil.rmtree(elsewhere)


@pytest.fixture
def bert(tmp_path, tiny_model, csv_files):  # noqa: F811
    arguments = csv_arguments(tiny_model, csv_files, "")[:-2]
    runs = Runs("bert", arguments, tmp_path, HF_HOME=str(tmp_path / "cache"))  # a cache that kills may damage
    yield runs
    runs.close()


def test_a_run_killed_amid_a_save_ends_as_if_it_had_not_been(vit):
    vit.arguments = vit_arguments(4)
    whole = vit.whole("whole")
    vit.start("killed", 2, 0.0005)
    assert vit.ended("killed")[0] == -signal.SIGALRM and not (vit.folder / "killed" / "result.json").exists()
    assert vit.whole("killed") == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_vit_killed_ten_times_ends_as_if_it_had_not_been(vit, seed):
    vit.arguments = vit_arguments(30)
    whole = vit.whole("whole")
    where = kill_over_and_over(vit, "killed", KILLS, seed)
    assert vit.whole("killed") == whole
    assert where.count("amid a save") >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_bert_killed_ten_times_ends_as_if_it_had_not_been(bert, seed):
    bert.arguments += ["--epochs", "12", "--evaluations", "24"]
    whole = bert.whole("whole")
    where = kill_over_and_over(bert, "killed", KILLS, seed)
    assert bert.whole("killed") == whole
    assert where.count("amid a save") >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_ctrl_c_and_sigterm_at_any_moment(name, request):
    """An interrupt is one line and exit code 130; a stopped run ends as if it had not been."""
    runs = request.getfixturevalue(name)
    runs.arguments += vit_arguments(30) if name == "vit" else ["--epochs", "6", "--evaluations", "12"]
    whole, rng = runs.whole("whole"), random.Random(0)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        process = runs.start("stopped")
        time.sleep(rng.uniform(0.3, 2))
        with contextlib.suppress(ProcessLookupError):  # it was quick, and is over
            os.kill(process, number)
        code, printed = runs.ended("stopped")
        if code == 0:
            break
        if number == signal.SIGINT:
            assert code == 130 and "Traceback" not in printed, printed
            assert "Interrupted: the same command goes on from the last checkpoint" in printed
    assert runs.outcome("stopped") == whole if code == 0 else runs.whole("stopped") == whole


def ended(process):
    """Whether a process is over; one that nobody has asked for its exit code stays as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except OSError:
        return True


def children(process):
    """The processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(") ")[2].split()[1]) == process:
                found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_two_processes_end_with_their_launcher_and_go_on(name, request):
    """kill -9 reaches the launcher alone; its processes end with it, the folder is free, and the run goes on."""
    runs = request.getfixturevalue(name)
    runs.arguments += vit_arguments(10) if name == "vit" else ["--epochs", "8", "--evaluations", "8"]
    rng = random.Random(0)

    def start(folder):
        words = [*runs.arguments, "--output_dir", runs.folder / folder]
        command = [sys.executable, "-m", "sadam_integrations", "run", name, "--nproc", "2", *words]
        return subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=runs.env
        )

    def whole(folder):
        process = start(folder)
        printed, _ = process.communicate(timeout=280)
        assert process.returncode == 0, printed
        return printed

    whole("whole")
    for _ in range(2):
        process, begun = start("killed"), list((runs.folder / "killed" / "checkpoints").glob("*"))
        while list((runs.folder / "killed" / "checkpoints").glob("*")) == begun and process.poll() is None:
            time.sleep(0.01)
        workers = children(process.pid)
        assert len(workers) == 2 and process.poll() is None
        time.sleep(rng.uniform(0, 0.2))
        process.kill(), process.communicate()
        deadline = time.time() + 10
        while not all(map(ended, workers)) and time.time() < deadline:
            time.sleep(0.05)
        assert all(map(ended, workers))
    assert "Resuming from" in whole("killed")
    assert runs.outcome("killed") == runs.outcome("whole")
