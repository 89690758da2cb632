"""Unmodified scripts with the names registered: alone, under torchrun and under accelerate."""

import csv
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import hf_tiny
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertTokenizerFast, set_seed
from transformers.training_args import OptimizerNames

from sadam_integrations import launch

SCRIPT = Path(__file__).parent / "scripts" / "text_classification.py"
LAUNCH = ["-m", "sadam_integrations.launch"]
PROBE = """
import json, sys
from pathlib import Path
import neighbour
Path(sys.argv[1]).write_text(json.dumps({"argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__}))
if __name__ == "__main__":
    sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a script and a module that the script imports; sys.argv and sys.path are put back afterwards."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "probe.py").write_text(PROBE)
    (tmp_path / "sub" / "neighbour.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch"])
    monkeypatch.setattr(sys, "path", ["elsewhere", *sys.path])
    yield tmp_path
    sys.modules.pop("neighbour", None)


def test_a_script_sees_what_python_would_show_it(folder):
    with pytest.raises(SystemExit) as stop:
        launch.main(["sub/probe.py", "seen.json", "3"])
    assert stop.value.code == 3
    seen = json.loads((folder / "seen.json").read_text())
    python = subprocess.run([sys.executable, "sub/probe.py", "python.json", "3"], cwd=folder)
    assert python.returncode == 3
    assert {**seen, "argv": None} == {**json.loads((folder / "python.json").read_text()), "argv": None}
    assert seen["argv"] == [str(folder / "sub" / "probe.py"), "seen.json", "3"]
    assert "sadam" in {member.value for member in OptimizerNames}


def test_a_module(folder):
    sys.path[0] = str(folder / "sub")
    with pytest.raises(SystemExit) as stop:
        launch.main(["-m", "probe", "seen.json", "4"])
    assert stop.value.code == 4
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["name"] == "__main__" and seen["argv"] == [str(folder / "sub" / "probe.py"), "seen.json", "4"]


PARENT = """
import sys
from accelerate.commands.launch import launch_command, launch_command_parser
launch_command(launch_command_parser().parse_args(["--cpu", "--num_processes=1", *sys.argv[1:]]))
"""
CHILD = """
import json, sys
from pathlib import Path
from transformers.training_args import OptimizerNames
names = [name.value for name in OptimizerNames]
Path(sys.argv[1]).write_text(json.dumps([sys.argv[1:], sys.path[0], "sadamw" in names, __name__]))
"""


@pytest.mark.parametrize("before", [[], ["-m"]])
def test_a_program_that_starts_accelerate_hands_the_names_on(before, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "child.py").write_text(CHILD)
    child = ["--module", "child"] if before else ["child.py"]
    done = subprocess.run([sys.executable, *LAUNCH, "parent.py", *child, "seen.json", "--optim=sadamw"], cwd=tmp_path)
    assert done.returncode == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen == [["seen.json", "--optim=sadamw"], str(tmp_path), True, "__main__"]


SPAWNING = """
import json, multiprocessing, sys, torch
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def names(i, path=None):
    from transformers import Trainer
    from transformers.trainer import DEFAULT_CALLBACKS
    from transformers.training_args import OptimizerNames

    found = ["sadamw" in {name.value for name in OptimizerNames}, [c.__name__ for c in DEFAULT_CALLBACKS][-1]]
    if path is not None:
        Path(f"{path}.{i}").write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    torch.multiprocessing.spawn(names, (sys.argv[1],), nprocs=2)
    for method in ("spawn", "forkserver"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
            Path(f"{sys.argv[1]}.{method}").write_text(json.dumps(list(pool.map(names, [0]))[0]))
"""


@pytest.mark.parametrize("option", [[], ["--monitor"]])
def test_processes_that_a_script_spawns_know_the_names(option, tmp_path):
    (tmp_path / "script.py").write_text(SPAWNING)
    assert subprocess.run([sys.executable, *LAUNCH, *option, "script.py", "seen"], cwd=tmp_path).returncode == 0
    for end in ("0", "1", "spawn", "forkserver"):
        known, callback = json.loads((tmp_path / f"seen.{end}").read_text())
        assert known and (callback == "ALRCallback") == bool(option), end


def test_handing_on_twice_or_a_program_that_is_not_python_changes_nothing(monkeypatch):
    from accelerate.commands import launch as accelerate

    seen = []
    monkeypatch.setattr(accelerate, "launch_command", seen.append)
    launch._hand_on_to_accelerate(["--monitor"])
    launch._hand_on_to_accelerate(["--monitor"])
    for script, no_python in (("x.py", False), ("sadam_integrations.launch", False), ("x.sh", True)):
        args = {"training_script": script, "training_script_args": ["--a"], "module": False, "no_python": no_python}
        accelerate.launch_command(types.SimpleNamespace(**args))
    ours, already, shell = seen
    assert (ours.module, ours.training_script) == (True, "sadam_integrations.launch")
    assert ours.training_script_args == ["--monitor", "x.py", "--a"]
    for args in (already, shell):
        assert not args.module and args.training_script_args == ["--a"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P came with Python 3.11")
def test_safe_path_keeps_the_first_entry(folder):
    code = """if True:
        import sys, types
        sys.modules["sadam_integrations.huggingface"] = types.ModuleType("stands in: what it registers is not at issue")
        from sadam_integrations.launch import main
        before = list(sys.path)
        try:
            main(["sub/probe.py", "seen.json", "3"])
        except ModuleNotFoundError as error:
            print(error.name, sys.path == before)
    """
    done = subprocess.run([sys.executable, "-Pc", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "neighbour True\n", done.stderr


def test_help(capsys):
    launch.main(["--help"])
    shown = capsys.readouterr().out
    assert "torchrun --nproc-per-node 2 -m sadam_integrations.launch run_glue.py" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no script to run"),
        (["-m"], "no module to run"),
        (["--optim", "sadam", "x.py"], "--optim comes before the script"),
        (["missing.py"], "there is no script 'missing.py'"),
        (["."], "'.' is a folder without a __main__.py"),
        (["-m", "nope.mod"], "there is no module 'nope.mod' that can be run"),
        (["-m", "email"], "there is no module 'email' that can be run"),
        (["-m", ".relative"], "there is no module '.relative' that can be run"),
        (["-m", ""], "there is no module '' that can be run"),
    ],
)
def test_a_wrong_command_line(argv, message, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# The real thing: text_classification.py in processes of its own


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny BERT and 32 short texts."""
    root = tmp_path_factory.mktemp("launch")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (root / "bert").mkdir()
    (root / "bert" / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(root / "bert").save_pretrained(root / "bert")
    set_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # so that one and two processes agree
    BertForSequenceClassification(hf_tiny.config(**still)).save_pretrained(root / "bert")
    rows = [(" ".join(words[5 + (7 * i + j * (i + 3)) % 26] for j in range(6)), i % 2) for i in range(32)]
    with open(root / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    with open(root / "data.json", "w") as file:
        file.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    return root


def run(work, out, before, *options, data="csv", batch=8):
    """Trains eight steps; returns the output, and the final weights and optimizer state that were saved."""
    files = {"train_file": work / f"data.{data}", "validation_file": work / f"data.{data}", "cache_dir": work / "cache"}
    model = {"model_name_or_path": work / "bert", "output_dir": work / out, "optim": "sadamw"}
    numbers = {"per_device_train_batch_size": batch, "num_train_epochs": 2, "learning_rate": 1e-3, "max_grad_norm": 0}
    arguments = [f"--{k}={v}" for k, v in {**files, **model, **numbers, "report_to": "none"}.items()]
    flags = ["--do_train", "--do_eval", "--use_cpu", "--disable_tqdm=true", *options]
    done = subprocess.run(
        [sys.executable, *before, str(SCRIPT), *arguments, *flags],
        cwd=work,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CI": ""},  # under CI a line is logged twice
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    state = torch.load(work / out / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert "accuracy" in (work / out / "eval_results.json").read_text()
    return done.stdout + done.stderr, load_file(work / out / "model.safetensors"), state


@pytest.fixture(scope="module")
def one_process(work):
    return run(work, "one", LAUNCH, "--weight_decay=0.1")


def test_the_script_trains_with_the_optimizer_named(one_process):
    output, _, state = one_process
    assert "is SadamW(lr=0.001, betas=(0.9, 0.999), beta='auto', weight_decay=0.1)" in output
    assert {g["beta"] for g in state["param_groups"]} == {"auto"}
    assert all(s["beta"] > 0 and s["step"] == 8 for s in state["state"].values())


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="gloo may hang at the exit")
def test_two_processes_give_the_result_of_one(work, one_process):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *LAUNCH]
    output, weights, state = run(work, "two", torchrun, "--ddp_backend=gloo", "--weight_decay=0.1", batch=4)
    _, expected, _ = one_process
    assert output.count("is SadamW(") == 1  # the main process says it, not each one
    assert all(s["beta"] > 0 for s in state["state"].values())
    start = load_file(work / "bert" / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("key.bias"):
            continue  # softmax does not see it: its gradient is rounding noise, and any optimizer of Adam's kind walks
        moved = (expected[name] - start[name]).abs().max()
        difference = (weight - expected[name]).abs().max()
        assert difference <= 1e-3 * moved, (name, difference, moved)


@pytest.mark.slow
def test_accelerate_launch_and_a_json_file_give_the_result_of_python(work, one_process):
    accelerate = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
    accelerate += ["--mixed_precision=no", "--dynamo_backend=no"]
    output, weights, _ = run(work, "accelerate", [*accelerate, *LAUNCH], "--weight_decay=0.1", data="json")
    assert "is SadamW(" in output
    assert all(torch.equal(weight, one_process[1][name]) for name, weight in weights.items())
