"""What the rows provoke their messages with: small optimizers, checkpoints, command lines and files."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from sadam_integrations import Sadam, SadamW, cli, launch


def one(value=1.0):
    return torch.nn.Parameter(torch.full((3,), value))


def stepped(cls=SadamW, gradient=1.0, **arguments):
    """An optimizer that took a step."""
    p = one()
    optimizer = cls([p], **arguments)
    p.grad = torch.full_like(p, gradient)
    optimizer.step()
    return optimizer


def build(**arguments):
    return lambda place: Sadam([one()], **arguments)


def load(change, cls=SadamW, **arguments):
    """Loads a checkpoint of SadamW that was changed."""

    def provoke(place):
        saved = stepped().state_dict()
        change(saved)
        cls([one()], **arguments).load_state_dict(saved)

    return provoke


def optim_args(text, **others):
    """Builds the optimizer as the Trainer would."""

    def provoke(place):
        from sadam_integrations.huggingface._optim_args import optimizer_kwargs

        numbers = {"learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.0}
        optimizer_kwargs("sadamw", SadamW, SimpleNamespace(optim_args=text, **{**numbers, **others}))

    return provoke


def sadam(*words, files=()):
    """Runs the command; the files, from name to content, are made first. Returns what it said to stderr."""

    def provoke(place):
        write(place, files)
        return said(lambda: cli.main([str(word) for word in words]))

    return provoke


def starts(*words):
    """Runs the launcher."""
    return lambda place: said(lambda: launch.main(list(words)))


def said(call):
    """What a command says to stderr; it is to end with exit code 2, and one line that names the error."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = call()
        except SystemExit as stop:
            code = stop.code
    text = err.getvalue()
    errors = ["error: " in line for line in text.splitlines()]
    assert code == 2 and sum(errors) == 1 and "Traceback" not in text, (code, text)
    return text


def write(place, files):
    for name, content in dict(files).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def recipe(name):
    """A recipe's module."""
    from sadam_integrations import recipe

    return recipe.load(recipe.recipes_folder() / f"{name}.py")


def bert(*words, files=()):
    """Runs the recipe in this process, up to the mistake."""
    return sadam("run", "bert", "--model", "mine", *words, files=files)


def vit(*words, files=()):
    return sadam("run", "vit", *words, files=files)


def without(name, call):
    """Calls something as if a module were not installed."""

    def provoke(place):
        with mock.patch.dict(sys.modules, {name: None}):
            return call(place)

    return provoke


def saved(name, value):
    """Saves a value with torch.save."""

    def make(place: Path):
        torch.save(value() if callable(value) else value, place / name)
        return place / name

    return make
