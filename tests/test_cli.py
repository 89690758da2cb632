"""The sadam command: what each verb prints and makes, its answers to mistakes, and what an interrupt leaves behind."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from sadam_integrations import backends, cli, recipe
from sadam_integrations.cli import calibrate, compare, recipes, tables

for module in ("jsonargparse", "matplotlib", "tqdm"):
    pytest.importorskip(module)

ROOT = Path(__file__).parents[1]
TOY = Path(__file__).parent / "scripts" / "toy.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder to be in, with a recipe of one's own."""
    for file in (TOY, TOY.with_suffix(".yaml")):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*words, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "sadam_integrations", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what it runs with &
        **kwargs,
    )  # fmt: skip


def until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def told(capsys, *words):
    """The exit code, and what was printed."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


# ---------------------------------------------------------------- help, ls, env, cp


def test_no_argument_teaches(capsys):
    code, out, _ = told(capsys)
    assert code == 0
    for verb in ("ls", "run", "cp", "compare", "calibrate", "env"):
        assert f"  sadam {verb}" in out and re.search(rf"^    {verb} +\w", out, re.MULTILINE)


@pytest.mark.parametrize("verb", ["ls", "run", "cp", "compare", "calibrate", "env"])
def test_every_verb_has_help_with_examples(capsys, verb):
    code, out, _ = told(capsys, verb, "--help")
    assert code == 0 and out.startswith(f"usage: sadam {verb}")
    assert verb == "env" or re.search(rf"^  sadam {'run' if verb == 'ls' else verb} ", out, re.MULTILINE)


def test_ls_reads_the_folder(capsys, tmp_path, monkeypatch):
    code, out, _ = told(capsys, "ls")
    assert code == 0
    for file in (ROOT / "recipes").glob("*.yaml"):
        assert re.search(rf"^    {file.stem} +\w.{{30,}}$", out, re.MULTILINE), file.name
    for name in recipes.names():
        assert f"\n{name}: " in f"\n{out}"
    (tmp_path / "mine.py").write_text('"""What it does."""\n')
    (tmp_path / "mine.yaml").write_text("# Trains this on that\nlr: 1\n")
    monkeypatch.setattr(recipes, "recipes_folder", lambda: tmp_path)
    assert told(capsys, "ls")[1].split("\n")[:2] == ["mine: What it does.", "    mine  Trains this on that"]


def test_env_says_what_is_in_use(capsys):
    code, out, _ = told(capsys, "env")
    assert code == 0
    assert re.search(r"^torch +\d", out, re.MULTILINE)
    step = re.search(r"^a step on a CPU +(.*)$", out, re.MULTILINE)[1]
    if backends.missing("cpu"):
        assert step.startswith("for-loop, ") and "rebuild" in step
    else:
        assert re.fullmatch(r"kernel \((avx512|avx2|neon|baseline), threads: \d+\)", step)


def test_cp_gives_files_that_run(capsys, toy):
    code, out, _ = told(capsys, "cp", "bert", "mine", "--config", "bert_glue")
    copied = sorted(path.name for path in (toy / "mine").iterdir())
    assert code == 0 and copied == ["bert.py", "bert.yaml", "bert_glue.yaml"]
    assert out.endswith("Run it: sadam run mine/bert.py --config bert_glue\n")
    assert (toy / "mine" / "bert.py").read_text() == (ROOT / "recipes" / "bert.py").read_text()
    code, _, err = told(capsys, "cp", "bert", "mine")
    assert code == 2 and "mine/bert.py, mine/bert.yaml exists: give --overwrite" in err
    assert told(capsys, "cp", "bert", "mine", "--overwrite")[0] == 0
    code, out, _ = told(capsys, "cp", "./toy.py", "again.py")
    assert code == 0 and out == "again.py\nagain.yaml\nRun it: sadam run ./again.py\n"
    code, out, _ = told(capsys, "run", "./again.py")
    assert code == 0 and out.endswith("-> runs/toy\n")
    assert (toy / "runs" / "toy" / "recipe.py").read_text() == TOY.read_text()


def test_a_run_can_be_made_again_from_its_folder(capsys, toy):
    assert told(capsys, "run", "./toy.py", "--lr", "0.3", "--optimizer_args.beta", "7")[0] == 0
    code, _, err = told(capsys, "run", "runs/toy/recipe.py", "--output_dir", "b")
    assert code == 2 and "no value for " in err and "--config FILE with every key" in err
    assert told(capsys, "run", "runs/toy/recipe.py", "--config", "runs/toy/config.yaml", "--output_dir", "b")[0] == 0
    first, second = (json.loads((toy / folder / "result.json").read_text()) for folder in ("runs/toy", "b"))
    assert first["metrics"] == second["metrics"] and second["config"]["optimizer_args"] == {"beta": 7}
    assert "validation accuracy" in (toy / "b" / "log.txt").read_text()


# ---------------------------------------------------------------- run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu", "bert"], "unknown verb 'rnu' (did you mean run?)"),
        (["run", "brt"], "unknown recipe 'brt': did you mean 'bert'?"),
        (["run", "xyz"], "unknown recipe 'xyz': there are bert, "),
        (["run", "toy"], "unknown recipe 'toy': for your own file, write toy.py"),
        (["run", "./none.py"], "there is no file './none.py'"),
        (["run", "./toy.py", "--lrr", "1"], "unknown key 'lrr': did you mean 'lr'?"),
        (["run", "./toy.py", "--lr", "fast"], "lr: 'fast' is not a valid value, expected float"),
        (["run", "./toy.py", "--config", "nope"], "config: 'nope' is neither a file nor one of toy"),
        (["run", "./toy.py", "--nproc", "0"], "--nproc: 0 is not valid, it is at least 1"),
        (["run", "./empty.py"], "it has no main"),
        (["cp", "brt", "."], "unknown recipe 'brt'"),
        (["cp", "bert", ".", "--config", "glue"], "--config: 'glue' is none of bert, bert_glue"),
        (["compare", "./toy.py"], "give --optimizers, such as"),
        (["compare", "./toy.py", "--optimizers", "adamv"], "--optimizers adamv: create_optimizer: unknown optimizer"),
        (["compare", "./toy.py", "--optimizers", "adamw:beta=1"], "AdamW has no argument 'beta'"),
        (["compare", "./toy.py", "--optimizers", "sadamw:beta"], "'beta' is not of the form key=value"),
        (["compare", "./toy.py", "--optimizers", "sadamw:beta=-1"], "beta"),
        (["compare", "./toy.py", "--optimizers", "sadamw:beta=["], "'[' is not a value"),
        (["compare", "./toy.py", "--optimizers", "sgd:lr=3"], "optimizer_args.lr: it has a key of its own, --lr"),
        (
            ["compare", "./toy.py", "--optimizers", "sgd", "--overwrite"],
            "each run of a comparison has a folder of its own",
        ),
        (["compare", "./toy.py", "--optimizers", "sgd", "--lrs", "x"], "lr: 'x' is not a valid value"),
        (["compare", "./toy.py", "--optimizers", "sgd", "--seeds", "0"], "--seeds: 0 is not valid"),
        (["compare", "./toy.py", "--optimizers", "sgd", "--seed", "1"], "--seed: in a comparison this is --seeds"),
        (["compare", "./toy.py", "--optimizers", "sgd", "--epoch", "1"], "unknown key 'epoch': did you mean 'epochs'"),
        (["compare", "./toy.py", "bert", "--optimizers", "sgd"], "is not the folder of a finished run"),
        (["compare", "./empty.py", "--optimizers", "sgd"], "it has no Config, DEFAULT_CONFIG"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, toy, words, message):
    (toy / "empty.py").write_text("")
    code, out, err = told(capsys, *words)
    assert code == 2 and message in err and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (toy / "runs").exists()


def test_what_is_given_beside_smoke_holds(toy):
    module = recipe.load(Path("toy.py"), "Config")
    (toy / "toy_long.yaml").write_text("epochs: 50\nlr: 0.7\n")
    default = Path("toy.yaml")

    def parsed(*words):
        config = recipe.parse(module.Config, words, None, default)
        return config.smoke, config.epochs, config.lr

    assert parsed("--config", "toy_long") == (False, 50, 0.7)
    assert parsed("--config", "toy_long", "--smoke") == parsed("--smoke", "--config=toy_long") == (True, 1, 0.7)
    assert parsed("--epochs", "2", "--config", "toy_long.yaml", "--smoke") == (True, 2, 0.7)


def test_several_processes_and_their_mistakes(toy):
    process = start("run", "./toy.py", "--nproc", 2, "--output_dir", "two")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "") and out.startswith("2 processes\n") and out.count("-> two") == 1
    process = start("run", "--nproc", 2, "./toy.py", "--lr", "fast")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert err == "error: lr: 'fast' is not a valid value, expected float\n"


@pytest.mark.parametrize("words", [(), ("--nproc", 2)], ids=["one process", "two processes"])
def test_an_interrupt_ends_cleanly_and_the_same_command_goes_on(toy, words):
    process = start("run", "./toy.py", *words, "--epochs", 4, "--pause", 1.5, start_new_session=True)
    until((toy / "runs/toy/checkpoints/last.pt").exists, process)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: every process of the terminal gets it
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted: the same command goes on from the last checkpoint" in err and "Traceback" not in err
    process = start("run", "./toy.py", *words, "--epochs", 4, "--pause", 0)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "another config (pause was 1.5, now 0.0)" in err


# ---------------------------------------------------------------- compare


def comparison(folder):
    return json.loads((folder / "compare.json").read_text())


def without_times(found):
    runs = [{key: value for key, value in run.items() if key != "seconds"} for run in found["runs"]]
    return {**found, "runs": runs, "hardware": {**found["hardware"], "threads": None}}


def test_compare(capsys, toy):
    words = ["compare", "./toy.py", "--optimizers", "adamw", "sgd:momentum=0.5", "--lrs", "0.1", "0.02", "--seeds", 2]
    words += ["--epochs", 5]
    runs = toy / "runs/compare/toy"
    for name, given in (("adamw", {}), ("sgd", {"momentum": 0.5})):  # all but one exist already
        for lr in ("0.1", "0.02"):
            for seed in ("0", "1"):
                folder = runs / f"{name}{'-momentum=0.5' if given else ''}-lr{lr}-seed{seed}"
                keys = {"optimizer": name, "optimizer_args": json.dumps(given), "lr": lr, "seed": seed, "epochs": "5"}
                assert (
                    told(capsys, "run", "toy.py", f"--output_dir={folder}", *(f"--{k}={keys[k]}" for k in keys))[0] == 0
                )
    shutil.rmtree(folder)
    code, out, err = told(capsys, *words)
    assert code == 0 and "1/1" in err
    found = comparison(runs)
    assert [(run["optimizer"], run["lr"], run["seed"]) for run in found["runs"]] == [
        (optimizer, lr, seed) for optimizer in ("adamw", "sgd:momentum=0.5") for lr in (0.1, 0.02) for seed in (0, 1)
    ]
    for run in found["runs"]:
        result = json.loads((runs / run["folder"] / "result.json").read_text())
        assert run["metrics"] == result["metrics"] and result["config"]["epochs"] == 5
    assert (result["config"]["optimizer"], result["config"]["optimizer_args"]) == ("sgd", {"momentum": 0.5})
    assert not (folder / "model").exists()
    accuracy = [run["metrics"]["validation_accuracy"] for run in found["runs"]]
    for row, a, b in zip(found["summary"], accuracy[::2], accuracy[1::2], strict=True):
        assert row["validation_accuracy"] == pytest.approx({"mean": (a + b) / 2, "sd": abs(a - b) / 2**0.5})
    assert [row["chosen"] for row in found["summary"]] == [True, False, True, False]
    gap = f"{(accuracy[4] + accuracy[5] - accuracy[0] - accuracy[1]) / 2:+.3f}"
    line = "sgd:momentum=0.5 - adamw, 2 seeds, mean difference ± standard error: validation accuracy "
    assert line + gap in out
    assert (runs / "compare.png").read_bytes().startswith(b"\x89PNG")

    code, again, _ = told(capsys, *words)
    assert code == 0 and again == out and comparison(runs) == found
    code, _, err = told(capsys, *words, "--epochs", 6)
    assert code == 2 and "holds a run with epochs: 5, now it is 6" in err

    folders = [runs / run["folder"] for run in found["runs"][:2]]
    code, out, _ = told(capsys, "compare", *folders, "--output_dir", "overlaid")
    assert code == 0 and all(str(folder) in out for folder in folders)
    assert len(comparison(toy / "overlaid")["summary"]) == 2 and (toy / "overlaid/compare.png").exists()
    code, _, err = told(capsys, "compare", *folders, "--optimizers", "sgd")
    assert code == 2 and "compared as they are" in err


def run_for(capsys, folder, seed=0, **keys):
    """Makes a run of a comparison in this process."""
    words = [f"--{key}={value}" for key, value in {"optimizer": "sgd", "lr": 0.1, "seed": seed, **keys}.items()]
    return told(capsys, "run", "toy.py", f"--output_dir={folder}/sgd-lr{keys.get('lr', 0.1)!r}-seed{seed}", *words)


def test_compare_with_runs_that_diverged(capsys, toy):
    for lr in (0.1, 1e30):
        for seed in (0, 1):
            assert run_for(capsys, "runs/compare/toy", seed, lr=lr)[0] == 0
    code, out, _ = told(
        capsys, "compare", "toy.py", "--optimizers", "sgd", "--lrs", "0.1", "1e30", "1e-1", "--seeds", 2
    )
    assert code == 0 and re.search(r"^\| sgd +\| 1e\+30 +\| 2 +\| .*\| nan +\|$", out, re.MULTILINE)
    text = (toy / "runs/compare/toy/compare.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    found = json.loads(text)
    assert [(row["lr"], row["runs"], row["chosen"]) for row in found["summary"]] == [(0.1, 2, True), (1e30, 2, False)]
    assert found["summary"][1]["validation_loss"] == {"mean": None, "sd": None}
    assert (toy / "runs/compare/toy/compare.png").exists()


def test_compare_takes_nothing_that_was_made_otherwise(capsys, toy):
    words = ["compare", "toy.py", "--optimizers", "sgd", "--seeds", 1]
    assert run_for(capsys, "runs/compare/toy")[0] == 0
    assert told(capsys, *words)[0] == 0
    code, _, err = told(capsys, "compare", "toy.py", "--optimizers", "adam", "--seeds", 1)
    assert code == 2 and "holds a comparison with sgd-lr0.1-seed0, which is not part of this one" in err
    source = (toy / "toy.py").read_text()
    (toy / "toy.py").write_text(source.replace("2 * x", "3 * x"))
    code, _, err = told(capsys, *words)
    assert code == 2 and "another version of the recipe" in err
    (toy / "toy.py").write_text(source)
    folder = toy / "runs/compare/toy/sgd-lr0.1-seed0"
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "metrics": {"f1": 1.0}}))
    code, _, err = told(capsys, *words)
    assert code == 2 and "has no validation_accuracy among its metrics" in err
    (folder / "result.json").unlink()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/last.pt").write_text("")
    code, _, err = told(capsys, *words, "--epochs", 9)
    assert code == 2 and "holds a run with epochs: 3, now it is 9" in err


def test_a_terminal_without_the_signs_loses_nothing(capsys, toy):
    for seed in (0, 1):
        assert run_for(capsys, "runs/compare/toy", seed)[0] == 0
    words = ["compare", "toy.py", "--optimizers", "sgd", "--seeds", "2"]
    command = [sys.executable, "-m", "sadam_integrations", *words]
    done = subprocess.run(command, env={**ENV, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "? 0." in done.stdout, done.stderr


def test_compare_chooses_among_the_rates_with_the_fewest_failures():
    metrics = {(0.1, 0): 0.5, (0.1, 1): 0.6, (0.2, 0): 0.9}
    runs = [
        tables.Run("a", lr, seed, Path("x"), "x", result={"metrics": {"validation_accuracy": accuracy}})
        for (lr, seed), accuracy in metrics.items()
    ]
    assert [row["chosen"] for row in tables.summarise(runs)] == [True, False]


def test_compare_says_in_what_overlaid_runs_differ(capsys, toy):
    for name, lr in (("a", 0.1), ("b", 0.2)):
        assert told(capsys, "run", "toy.py", "--output_dir", name, "--lr", lr)[0] == 0
    code, out, _ = told(capsys, "compare", "a", "b", "a", "--output_dir", "both")
    assert code == 0 and "\nThe runs differ in lr.\n2 of 2 runs" in out and " ± " not in out
    code, _, err = told(capsys, "compare", "a", "none")
    assert code == 2 and "none holds no finished run" in err
    result = json.loads((toy / "b/result.json").read_text())
    (toy / "b/result.json").write_text(json.dumps({**result, "recipe": "other"}))
    code, _, err = told(capsys, "compare", "a", "b")
    assert code == 2 and "different recipes, other, toy" in err


def test_arguments_of_an_optimizer_may_be_lists_and_classes_ones_own(toy, monkeypatch, capsys):
    assert compare.optimizer_arguments("adamw", "betas=[0.8,0.95],fused=false") == {
        "betas": [0.8, 0.95],
        "fused": False,
    }
    (toy / "mine_too.py").write_text("import torch\nclass Mine(torch.optim.SGD): pass\n")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    code, _, err = told(capsys, "compare", "toy.py", "--optimizers", "mine_too.Mine", "--lrs", "x")
    assert code == 2 and "lr: 'x' is not a valid value" in err  # the rate is wrong, the optimizer was found


def test_compare_reports_a_failure_and_keeps_the_rest(capsys, toy):
    words = ["compare", "./toy.py", "--optimizers", "sadamw", "--seeds", 2, "--smoke"]
    code, out, err = told(capsys, *words, "--fails_at", 0)
    folder = toy / "runs/compare/toy_smoke"
    assert code == 1 and "1 of 2 runs" in out
    assert "failed: runs/compare/toy_smoke/sadamw-lr0.1-seed0: seed: 0 fails" in err
    failed, finished = comparison(folder)["runs"]
    assert failed["error"] == "seed: 0 fails" and "metrics" in finished


def test_compare_stopped_between_and_inside_runs_ends_with_the_same_json(capsys, toy):
    keys = ["--epochs", 4, "--pause", 0.7]
    words = ["compare", "./toy.py", "--optimizers", "adamw", "--seeds", 2, *keys]
    for seed in (0, 1):
        run = ["run", "toy.py", "--optimizer", "adamw", "--seed", seed, *keys]
        assert told(capsys, *run, "--output_dir", f"whole/adamw-lr0.1-seed{seed}")[0] == 0
    assert told(capsys, *words, "--output_dir", "whole")[0] == 0
    first = toy / "parts" / "adamw-lr0.1-seed0"
    second = toy / "parts" / "adamw-lr0.1-seed1"
    process = start(*words, "--output_dir", "parts")
    until((first / "checkpoints/last.pt").exists, process)
    process.kill()  # the run itself lives on, as after a crash of the terminal: its result is taken
    process.wait()
    process = start(*words, "--output_dir", "parts")
    until((second / "checkpoints/last.pt").exists, process)
    assert (first / "result.json").exists()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted: the same command goes on from here." in err
    assert "Traceback" not in err and not (second / "result.json").exists()
    assert told(capsys, *words, "--output_dir", "parts")[0] == 0
    assert "Resuming at" in (second / "log.txt").read_text()
    assert without_times(comparison(toy / "parts")) == without_times(comparison(toy / "whole"))


# ---------------------------------------------------------------- every command that the texts show


def commands():
    """Every line that begins with ``sadam``, of the texts, the recipes, their configs and the help."""
    texts = {str(p.relative_to(ROOT)): p.read_text() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    texts |= {f"recipes/{name}": path.read_text() for name, path in recipes.names().items()}
    texts |= {p.name: p.read_text().replace("#", " ") for p in (ROOT / "recipes").glob("*.yaml")}
    texts["sadam --help"] = cli.DESCRIPTION
    for module in (cli.ls, cli.run, cli.cp, cli.compare, cli.calibrate, cli.env):
        texts[module.__name__] = module.DESCRIPTION
    for source, text in texts.items():
        verbs = "ls|run|cp|compare|calibrate|env"
        for line in re.findall(rf"^(?:.*: +)?\W*(sadam (?:{verbs})\b[^\n`]*)", text, re.MULTILINE):
            command = re.split(r" {2,}|: torchrun| #", line)[0].rstrip("` ")
            yield pytest.param(shlex.split(command)[1:], id=f"{source}: {command}")


@pytest.mark.parametrize("words", list(commands()))
def test_every_command_shown_is_one_that_works(words, capsys, toy):
    """Runs what is quick; of ``run`` and ``compare`` it reads everything and starts nothing."""
    (toy / "mine.csv").write_text("text,topic\n")
    shutil.copy("toy.py", "mine.py"), shutil.copy("toy.yaml", "mine.yaml")
    for folder in re.findall(r"_folder (\S+)", " ".join(words)):
        (toy / folder).mkdir(parents=True)
    told(capsys, "cp", "bert", ".")
    capsys.readouterr()
    verb, *rest = words
    if verb == "run":
        if "--nproc" in rest:
            at = rest.index("--nproc")
            assert int(rest[at + 1]) > 0
            del rest[at : at + 2]
        path = recipes.find(rest[0])
        if "--help" in rest or not recipe.config_files(path.with_suffix(".yaml")):
            with pytest.raises(SystemExit) as stop:
                recipe.load(path, "main").main([*rest[1:], "--help"])
            assert stop.value.code == 0
            return
        module = recipe.load(path, "main", "Config", "DEFAULT_CONFIG")
        for config in re.findall(r"--config (runs/\S+)", " ".join(rest)):  # what sadam calibrate leaves
            (toy / config).parent.mkdir(parents=True)
            (toy / config).write_text("lr: 1.0e-4\n")
        recipe.parse(module.Config, rest[1:], None, module.DEFAULT_CONFIG)
    elif verb == "calibrate":
        for name, file in (("recipe.py", "bert.py"), ("config.yaml", "bert.yaml")):
            (toy / "runs/bert").mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "recipes" / file, toy / "runs/bert" / name)
        (toy / "runs/mine/checkpoint-64").mkdir(parents=True)
        torch.save({}, toy / "runs/mine/checkpoint-64/optimizer.pt")
        parser = argparse.ArgumentParser(allow_abbrev=False)
        calibrate.arguments(parser)
        args, args.overrides = parser.parse_known_args(rest)
        source = calibrate.locate(args)
        assert source.exists()
        if source.suffix == ".py":
            assert calibrate.planned(source, args.overrides)[0].lr > 0
    elif verb == "compare" and "--optimizers" not in rest:
        assert all(word.startswith("runs/") for word in rest)
    elif verb == "compare":
        parser = argparse.ArgumentParser(allow_abbrev=False)
        compare.arguments(parser)
        args, args.overrides = parser.parse_known_args(rest)
        assert compare.planned(args)[0]
    else:
        assert told(capsys, *words, *(["--overwrite"] if verb == "cp" else []))[0] == 0


def test_the_default_configs_say_what_they_are():
    for path in (ROOT / "recipes").glob("*.yaml"):
        first = path.read_text().partition("\n")[0]
        assert first.startswith("# ") and 30 < len(first) < 120, path.name
        assert yaml.safe_load(path.read_text())
