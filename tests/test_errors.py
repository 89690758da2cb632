"""docs/errors.md: every message is provoked, each place that gives one has its row, and the page is up to date."""

from __future__ import annotations

import ast
import functools
import re
import warnings
from pathlib import Path

import errors
import pytest
from errors import places
from errors.sites import sites

for module in ("jsonargparse", "transformers", "lightning", "datasets", "evaluate", "matplotlib"):
    pytest.importorskip(module)

TESTS = Path(__file__).parent
ROWS = [row for rows in errors.sections().values() for row in rows]
PROVOKED = [row for row in ROWS if not isinstance(row.provoke, str)]
ELSEWHERE = [row for row in ROWS if isinstance(row.provoke, str)]


def test_each_row_is_one_message():
    for row in ROWS:
        assert len({site.template for site in places(row)}) == 1, (row.says, places(row))


def test_each_place_that_gives_a_message_has_a_row():
    told = {site for row in ROWS for site in places(row)}
    assert not (forgotten := [site for site in sites() if site not in told]), forgotten
    assert not [row.says for row in ROWS if not (row.cause.endswith(".") and row.fix.endswith("."))]


@pytest.mark.parametrize("row", PROVOKED, ids=lambda row: row.says)
def test_the_message(row, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            told.append(row.provoke(tmp_path))
        except (Exception, SystemExit) as error:
            told.append(f"{error.args[0]}" if error.args else "")
            assert type(error).__name__ in {site.kind for site in places(row)} | {"SystemExit", "RecipeError"}
    told += [str(warning.message) for warning in caught] + caplog.messages
    if row.says == "--workers: " and "not found: pip install" in str(told):
        pytest.skip("the studies need their extra")
    (site, *_) = places(row)
    assert any(site.matches(str(message)) for message in told), told


@functools.cache
def source_of(file):
    """The tests of a file by name, with their decorators, as plain text: strings joined, no backslashes."""
    source = (TESTS / file).read_text(encoding="utf-8")
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno]).replace("\\", "")
    return found


@pytest.mark.parametrize("row", ELSEWHERE, ids=lambda row: row.says)
def test_the_test_that_provokes_it_looks_for_words_of_the_message(row):
    file, _, name = row.provoke.partition("::")
    text = source_of(file)[name]
    words = [part for part in re.split(r"<[^<>]*>", places(row)[0].template) if len(part.split()) > 1]
    runs = [part.split()[i : i + n] for n in (2, 3) for part in words for i in range(len(part.split()) - n + 1)]
    told = [" ".join(run).strip(":,.()") for run in runs]
    assert any(run in text for run in told if len(run) >= 8), told


def test_the_page_is_up_to_date():
    page = TESTS.parent / "docs" / "errors.md"
    assert page.read_text(encoding="utf-8") == errors.page(), "make errors writes it anew"
