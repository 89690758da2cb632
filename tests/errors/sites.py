"""Finds every place in the package and the recipes that raises, warns or logs a warning, with its message."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDERS = ("sadam_integrations", "recipes")

WARNING_CALLS = {"warn": "UserWarning", "_warn": "UserWarning", "warning": "log", "warning_once": "log"}
"""Calls that tell something and go on, and what the reader gets."""
ENDING_CALLS = {"_fail": "exit code 2", "exit": "exit code 1", "error": "exit code 2"}
"""Calls that end a command with a message."""
WORDED_APART = {"_one_line", "missing"}
"""Functions that return messages which others raise."""


PASSED_ON = {"create_optimizer: <error>"}
"""Messages of another place with a word in front."""


class Site(NamedTuple):
    """One place that can tell the user of something: where it is, what the user gets, and the message."""

    where: str
    kind: str
    template: str

    @property
    def told_as(self) -> str:
        """What the user gets, in words."""
        if self.kind in ("exit code 2", "RecipeError", "ArgumentTypeError", "part of a message"):
            return "`error:` line"
        if self.kind == "ValueError" and self.where.startswith(("recipes/", "sadam_integrations/recipe.py")):
            return "`error:` line"  # what parses the config words it so
        return {"UserWarning": "warning", "log": "log line"}.get(self.kind, self.kind)

    def matches(self, message: str) -> bool:
        """Whether a message that was told is one of this place."""
        pattern = "".join(".*" if part.startswith("<") else re.escape(part) for part in _parts(self.template))
        return re.search(pattern, message, re.DOTALL) is not None


@functools.cache
def sites() -> list[Site]:
    """Returns all of them that have words of their own; what passes on another's message has none."""
    found: list[Site] = []
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                for kind, message in _told(node):
                    template = _template(message)
                    if re.search(r"[a-z]{2}", re.sub(r"<[^<>]*>|^error: ", "", template)) and template not in PASSED_ON:
                        found.append(Site(f"{file.relative_to(ROOT).as_posix()}:{node.lineno}", kind, template))
    return found


def _told(node: ast.AST) -> list[tuple[str, ast.expr]]:
    """What a node of the syntax tree tells the user: the kind and the message, or nothing."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        return [(_name(node.exc.func), node.exc.args[0])]
    if isinstance(node, ast.Call) and node.args:
        name = _name(node.func)
        if kind := WARNING_CALLS.get(name) or ENDING_CALLS.get(name):
            return [(kind, node.args[0])]
        if name == "print" and _template(node.args[0]).startswith("error: "):
            return [("exit code 2", node.args[0])]
    if isinstance(node, ast.FunctionDef) and node.name in WORDED_APART:
        returned = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return) and inner.value]
        return [("part of a message", value) for value in returned]
    return []


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _template(node: ast.expr) -> str:
    """A message as it stands in the code, with <names> where values go."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("%s", "<…>")
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(value) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"<{_placeholder(node.value)}>"
    return "<…>"


def _placeholder(value: ast.expr) -> str:
    name = _name(value)
    if name == "__name__" or name.endswith("cls_name"):
        return "class"
    return name if name and not isinstance(value, ast.Call) else "…"


def _parts(template: str) -> list[str]:
    return [part for part in re.split(r"(<[^<>\s]+>)", template) if part]
