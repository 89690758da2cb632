"""``sadam calibrate``: a short AdamW run, or a checkpoint, in; which beta and which learning rate, out."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from sadam_integrations import plots, recipe
from sadam_integrations.cli.recipes import find, names
from sadam_integrations.conversion import BETAS, FOLDER_FILES, Advice, advise
from sadam_integrations.factory import OPTIMIZERS
from sadam_integrations.run_folder import NOT_COMPARED, RecipeError, hardware, versions, write_json, write_text

SUMMARY = "find beta and learning rate from a short AdamW run"
DESCRIPTION = """\
Trains with AdamW for some steps, or reads a checkpoint of it, and tells from the moments what each beta would do: the
share of the coordinates on its floor, the spread of the adaptive learning rate, the learning rate at which the updates
have AdamW's size. Writes calibrate.json, calibrate.png and a config, sadamw.yaml, that sadam run takes.

  sadam calibrate bert                       64 steps of the recipe, with AdamW
  sadam calibrate vit --steps 200 --lr 1e-3  more steps; every other --key value is the recipe's
  sadam calibrate bert --beta 1e4            the config for this beta instead of beta="auto"
  sadam calibrate runs/bert                  the recipe and the config of a run, or its checkpoint of AdamW
  sadam calibrate runs/mine/checkpoint-64    a checkpoint of the Trainer; optimizer.pt, or a .ckpt of Lightning
  sadam run bert --config runs/calibrate/bert/sadamw.yaml
"""

OURS = {"optimizer": "--beta", "optimizer_args": "--beta", **dict.fromkeys(NOT_COMPARED, "--output_dir")}
"""Keys of a recipe that the verb sets itself, and what is given instead."""

ADAM = ("adam", "adamw", "adamw_torch", "adamw_torch_fused")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "what", metavar="RECIPE | RUN | CHECKPOINT", help="a recipe, a run's folder, or an optimizer's state"
    )
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="steps to train (default: 64)")
    parser.add_argument("--beta", type=float, metavar="X", help='fixed beta for the config (default: "auto")')
    parser.add_argument("--output_dir", type=Path, help="where to (default: runs/calibrate/NAME)")


def go(args: argparse.Namespace) -> int:
    """Trains or reads, prints the table and the advice, and writes the files."""
    recipe.require("matplotlib", "yaml")
    if args.steps < 2:
        raise RecipeError(f"--steps: {args.steps} is not valid, it is at least 2")
    if args.beta is not None and not 0 < args.beta < math.inf:
        raise RecipeError(f"--beta: {args.beta} is not valid, it is above 0")
    source = locate(args)
    folder = args.output_dir or Path("runs/calibrate") / name_of(args.what, source)
    config, run = planned(source, args.overrides) if source.suffix == ".py" else (None, None)
    state: Any = source
    if run:
        folder.mkdir(parents=True, exist_ok=True)  # an error of it is said now, not after the training
        state = short_run(run, config, args.steps)
    try:
        advice = advise(state, betas=(*BETAS, *([args.beta] if args.beta else [])))
    except ValueError as error:
        raise RecipeError(str(error)) from None
    folder.mkdir(parents=True, exist_ok=True)
    text, file = "\n".join(sentences(advice, args.beta)), folder / "sadamw.yaml"
    about = {"what": args.what, "overrides": args.overrides, "versions": versions(), "hardware": hardware()}
    write_json(folder / "calibrate.json", {**about, **dataclasses.asdict(advice), "advice": text})
    title = f"{name_of(args.what, source)}: AdamW's moments after {advice.optimizer_steps} steps, lr {advice.lr:.3g}"
    plots.calibration_figure(dataclasses.asdict(advice), folder / "calibrate.png", title)
    name = args.what if source.name != "recipe.py" else str(source)
    write_text(file, yaml_config(name if run else "RECIPE", args.overrides, args.beta, advice, config, file))
    print(f"\n{advice}\n\n{text}\n{file}, calibrate.json and calibrate.png -> {folder}")
    return 0


def locate(args: argparse.Namespace) -> Path:
    """Returns the recipe's file to run, or the checkpoint to read; words that a checkpoint has no use for are an error.

    A run's folder stands for its checkpoint, if it was made with AdamW, and else for its recipe with its config.
    """
    path = Path(args.what)
    if args.what in names() or path.suffix == ".py" or not path.exists():
        return find(args.what)
    if path.is_dir() and (path / "recipe.py").is_file():
        saved = [*path.glob("checkpoints/*.ckpt"), *path.glob("checkpoints/checkpoint-*/optimizer.pt")]
        if args.overrides or not saved or not made_with_adam(path):
            if not any(word.startswith("--lr") for word in args.overrides) and (other := rate_of_another(path)):
                raise RecipeError(f"{path} was trained with {other}: give --lr, a learning rate for AdamW")
            args.overrides = ["--config", str(path / "config.yaml"), *args.overrides]
            return path / "recipe.py"
        return max(saved, key=lambda file: file.stat().st_mtime)
    if path.is_dir() and not any((path / name).is_file() for name in FOLDER_FILES):
        raise RecipeError(
            f"{path} is neither a run's folder (recipe.py) nor a checkpoint's ({', '.join(FOLDER_FILES)})"
        )
    if args.overrides:
        raise RecipeError(f"{path} is read, not trained: leave {args.overrides[0]} out, or give a recipe")
    return path


def made_with_adam(folder: Path) -> bool:
    """Whether a run's config names Adam or AdamW."""
    return config_of(folder).get("optimizer") in ADAM


def rate_of_another(folder: Path) -> str | None:
    """The optimizer of a run whose learning rate is not one for AdamW, as that of beta="auto" is."""
    config = config_of(folder)
    name, arguments = config.get("optimizer"), config.get("optimizer_args") or {}
    auto = name in OPTIMIZERS and arguments.get("beta", "auto") == "auto"
    return None if name is None or name in ADAM or auto else f"{name} {arguments or ''}".strip()


def config_of(folder: Path) -> dict[str, Any]:
    """A run's config; empty if it cannot be read."""
    import yaml

    try:
        return dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}


def name_of(what: str, source: Path) -> str:
    """Returns what the folder of the result is called by default."""
    path = Path(what).resolve()
    if source.name == "recipe.py" or path.is_dir():
        return path.name
    return path.parent.name if path.name in FOLDER_FILES else path.stem


def planned(source: Path, overrides: list[str]) -> tuple[Any, Callable[[Any], Any]]:
    """Returns the config that a recipe makes of the command line, and its ``run``."""
    for word in overrides:
        key = word.lstrip("-").partition("=")[0].partition(".")[0]
        if word.startswith("--") and key in OURS:
            raise RecipeError(f"--{key}: the training is AdamW's; use {OURS[key]}")
    module = recipe.load(source, "Config", "DEFAULT_CONFIG", "run")
    config = recipe.parse(module.Config, overrides, None, module.DEFAULT_CONFIG)
    if lacking := [key for key in ("optimizer", "optimizer_args", "lr", "output_dir") if not hasattr(config, key)]:
        raise RecipeError(f"{source}: the recipe's config has no {', '.join(lacking)}: AdamW cannot be put in")
    return config, module.run


class _Enough(BaseException):
    """Ends a training from inside the optimizer's step; no Exception, so that nothing on the way takes it for one."""


def short_run(run: Callable[[Any], Any], config: Any, steps: int) -> dict[str, Any]:
    """Runs a recipe with AdamW, in a folder that is thrown away, and returns the optimizer's state after some steps.

    Args:
        run: The recipe.
        config: Its config.
        steps: After how many steps to stop; a shorter training is run to its end.

    Raises:
        RecipeError: If the recipe takes no step with an optimizer of torch's kind.
    """
    taken: dict[Any, int] = {}

    def after(optimizer: Any, args: Any, kwargs: Any) -> None:
        taken[optimizer] = taken.get(optimizer, 0) + 1
        if taken[optimizer] >= steps:
            raise _Enough

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        keys = {field.name for field in dataclasses.fields(config)}
        betas = {key: value for key, value in config.optimizer_args.items() if key == "betas"}
        changes: dict[str, Any] = {
            "optimizer": "adamw",
            "optimizer_args": betas,
            "output_dir": str(Path(folder, "run")),
        }
        changes |= {"overwrite": False, "evaluations": 1, "monitor": False}
        print(f"AdamW with lr {config.lr:g}, {steps} steps", flush=True)
        hook = register_optimizer_step_post_hook(after)
        try:
            run(dataclasses.replace(config, **{key: value for key, value in changes.items() if key in keys}))
        except _Enough:
            pass
        finally:
            hook.remove()
    if not taken:
        raise RecipeError("the recipe took no step with an optimizer of torch: there is nothing to measure")
    return max(taken, key=taken.__getitem__).state_dict()


def sentences(advice: Advice, beta: float | None) -> list[str]:
    """Returns the advice in words: on "auto", on the fixed beta that is asked for or nearest, and on the paper's."""
    adamw, auto = advice.row("adamw"), advice.row("auto")
    fixed, paper = advice.row(beta or advice.median_beta), advice.row(50.0)
    smaller = adamw.spread / auto.spread
    spread = "" if math.isnan(smaller) else f", its spread of the adaptive learning rate {smaller:.1f} times smaller"
    which = f"beta={fixed.beta:g}" if beta else f'The middle of what "auto" chooses, beta={fixed.beta:g},'
    lines = [
        f"beta=\"auto\" at AdamW's lr {advice.lr:.3g}: an update {1 / auto.lr_factor:.2f} times AdamW's size{spread}.",
        f"{which} has AdamW's size of update at lr {fixed.lr:.2g}, with {share(fixed.floor_share)} on the floor.",
    ]
    for row in {row.beta: row for row in (fixed, paper)}.values():
        if row.floor_share > 0.98:
            lines.append(
                f"beta={row.beta:g} leaves {share(row.floor_share)} on the floor: that is momentum SGD at "
                f"{1 / row.floor:.3g} x lr, whose lr is to be tuned, whatever its row says."
            )
    return lines


def share(value: float) -> str:
    """Returns a share in percent."""
    return f"{100 * value:.3g} %"


def yaml_config(
    recipe_name: str, overrides: list[str], beta: float | None, advice: Advice, config: Any, file: Path
) -> str:
    """Returns a config for ``sadam run``, with the reasons.

    Args:
        recipe_name: What ``sadam run`` is to run with it.
        overrides: The keys that were given to the recipe.
        beta: The fixed beta that was asked for.
        advice: What was found.
        config: The recipe's config, if one was run.
        file: Where the text will be.
    """
    import yaml

    row = advice.row(beta or "auto")
    keys: dict[str, Any] = {"optimizer": "sadamw", "optimizer_args": {"beta": beta or "auto"}}
    if beta:
        keys["lr"] = float(f"{row.lr:.2g}")
        why = [f"The learning rate is {row.lr_factor:.3g} times AdamW's, {advice.lr:.6g}: the updates have its size."]
        if config is None:
            why.append(f"Divide weight_decay by {row.lr_factor:.3g}: it is multiplied by the learning rate.")
        elif decay := getattr(config, "weight_decay", 0.0):
            keys["weight_decay"] = float(f"{decay / row.lr_factor:.2g}")
            why.append(f"The weight decay, {decay:g}, is divided by that: it is multiplied by the learning rate.")
    else:
        keys["lr"] = float(f"{advice.lr:.6g}")
        why = [f"AdamW's learning rate is kept: the updates are {1 / row.lr_factor:.2f} times AdamW's size."]
    if Path(recipe_name).name == "recipe.py":
        keys["output_dir"] = f"{config.output_dir}_sadamw"  # the run's config, which comes first, names its own folder
    words, rest = [], list(overrides)
    while rest:
        word = rest.pop(0)
        own = [word, rest.pop(0)] if rest and not rest[0].startswith("--") and "=" not in word else [word]
        words += [] if word.lstrip("-").partition("=")[0] in keys else own  # they would win over the file
    lines = [
        f"Advice of sadam calibrate, from {advice.optimizer_steps} steps",
        f"Run:      {shlex.join(['sadam', 'run', recipe_name, *words, '--config', str(file)])}",
        f"Trainer:  --optim sadamw --optim_args beta={beta or 'auto'} --learning_rate {keys['lr']:g}",
        *why,
        f"{share(row.floor_share)} of the coordinates are on the floor of the denominator.",
    ]
    return "".join(f"# {line}\n" for line in lines) + "\n" + yaml.safe_dump(keys, sort_keys=False)
