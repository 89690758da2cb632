"""Small models, texts and images for other people's programs, how to run those, and what to ask of what they saved.

Scripts that no package brings are run from checkouts of their projects: TRANSFORMERS_EXAMPLES and ACCELERATE_EXAMPLES
name the folder `examples` of each, TIMM_EXAMPLES the folder with timm's train.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # hf_tiny

ACCURACY = '''"""What a machine has in evaluate's cache that has once used evaluate.load("{name}")."""
import datasets, evaluate

class Metric(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {{"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(predictions)}}
'''
WITHOUT_OPERATORS = """
import importlib.util, pathlib, torch
spec = importlib.util.find_spec("torchvision")
if spec and torch.version.cuda is None and "+cu" in pathlib.Path(spec.origin).with_name("version.py").read_text():
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        library.define(name + "() -> Tensor")
"""  # a torchvision for GPUs beside a torch for CPUs cannot load its operators, which nothing here calls
exec(WITHOUT_OPERATORS)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with everything that the programs read."""
    import hf_tiny
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertForSequenceClassification,
        BertTokenizerFast,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        set_seed,
    )

    root = tmp_path_factory.mktemp("ecosystem")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    (root / "bert").mkdir()
    (root / "bert" / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast.from_pretrained(root / "bert").save_pretrained(root / "bert")
    set_seed(0)
    BertForSequenceClassification(hf_tiny.config()).save_pretrained(root / "bert")

    tokenizer = Tokenizer(models.WordLevel(dict(zip(["<pad>", "<s>", "</s>", *letters], range(29), strict=True))))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root / "llama")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=29, pad_token_id=0, **sizes)).save_pretrained(root / "llama")

    texts = [" ".join(letters[(7 * i + j * (i + 3)) % 26] for j in range(6)) for i in range(32)]
    for split in ("train", "validation"):
        (root / "text").mkdir(exist_ok=True)
        (root / "glue" / "mrpc").mkdir(exist_ok=True, parents=True)
        rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(texts)]
        (root / "text" / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "sft").mkdir()
    (root / "sft" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for metric in ("accuracy", "glue"):
        folder = root / "modules" / "evaluate_modules" / "metrics" / f"evaluate-metric--{metric}" / ("0" * 64)
        folder.mkdir(parents=True)
        (folder / f"{metric}.py").write_text(ACCURACY.format(name=metric))
    (root / "hand").mkdir()
    (root / "hand" / "sitecustomize.py").write_text(WITHOUT_OPERATORS)
    return root


@pytest.fixture
def run(home, tmp_path):
    """Runs a program with Python in a folder of its own, offline, and returns what it printed."""

    def run(*words):
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CI": ""}
        folders = {"HF_MODULES_CACHE": home / "modules", "HF_DATASETS_CACHE": tmp_path / "datasets"}
        folders["PYTHONPATH"] = os.pathsep.join([str(home / "hand"), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env={**os.environ, **quiet, **{k: str(v) for k, v in folders.items()}},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def examples(variable: str, path: str) -> Path:
    """A script of another project's examples, which no package brings; skips where no checkout is named."""
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} names no checkout of the examples")
    script = Path(root) / path
    assert script.exists(), f"{variable}={root}: there is no {path} in it"
    return script


def check_saved(checkpoint: Path, beta: float | str = "auto") -> None:
    """Asserts that a Trainer's checkpoint was trained by one of our optimizers, and with a finite, moving loss."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {group["beta"] for group in state["param_groups"]} == {beta}
    assert state["state"] and all(entry["step"] > 0 for entry in state["state"].values())
    assert beta != "auto" or all(entry["beta"] > 0 for entry in state["state"].values())
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    check_losses([entry["loss"] for entry in history if "loss" in entry])


def check_losses(losses: list[float]) -> None:
    """Asserts that a loss was logged more than once, is finite and moved."""
    assert len(losses) > 1 and all(map(math.isfinite, losses)) and len(set(losses)) > 1, losses
