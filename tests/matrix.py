"""Runs tests with older and newer versions and writes the table of docs/reliability.md (make test-matrix)."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".venv-matrix"
PAGE = ROOT / "docs" / "reliability.md"
MARKS = "<!-- versions: begin -->\n", "<!-- versions: end -->"
COMBINATIONS = {  # Python, torch, transformers, lightning; "" is the newest that pip finds. 4.57.0 was withdrawn
    "oldest": ("3.10", "2.6.0", "4.57.1", "2.4.0"),
    "old-integrations": ("3.11", "2.13.0", "4.57.1", "2.4.0"),
    "old-torch": ("3.11", "2.6.0", "5.23.0", "2.6.6"),
    "python-3.12": ("3.12", "2.13.0", "5.23.0", "2.6.6"),
    "newest": ("3.13", "", "", ""),
}
TOOLS = ["pytest", "pytest-xdist", "hypothesis", "expecttest", "datasets", "evaluate", "scikit-learn", "matplotlib"]
TOOLS += ["tensorboard", "pillow", "setuptools"]
TESTS = [
    "alr",
    "auto",
    "bad_input",
    "checkpoints",
    "conformance",
    "cpu_kernel",
    "factory",
    "floor_warning",
    "huggingface",
]
TESTS += ["launch", "lightning", "lightning_cli", "odd_tensors", "optimizer", "param_groups", "update"]
NOT_RUN = "not run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMBINATIONS)}; all by default")
    parser.add_argument("--workers", default="2", help="processes that the tests run on")
    parser.add_argument("--keep", action="store_true", help="keep the environments, of up to 8 GB each")
    options = parser.parse_args()
    if unknown := set(options.names) - COMBINATIONS.keys():
        parser.error(f"no such combination: {', '.join(sorted(unknown))}; there are {', '.join(COMBINATIONS)}")
    WORK.mkdir(exist_ok=True)
    failed = False
    for name in options.names or COMBINATIONS:
        result = run(name, *COMBINATIONS[name], options)
        (WORK / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: {result}", flush=True)
        failed |= bool(result.get("failed"))
        write_table()
    sys.exit(failed)


def run(name: str, python: str, torch: str, transformers: str, lightning: str, options: argparse.Namespace) -> dict:
    """Makes the environment of a combination and runs the tests in it; says why where it cannot."""
    if not (interpreter := find_python(python)):
        return {"why": f"there is no Python {python} here"}
    folder = WORK / name
    try:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        wanted = {"torch": torch, "transformers[torch]": transformers, "lightning": lightning}
        pins = [f"{package}=={version}" if version else package for package, version in wanted.items()]
        install = [folder / "bin" / "python", "-m", "pip", "install", "-q", *pins, *TOOLS]
        if subprocess.run([*install, "-e", f"{ROOT}[transformers,lightning]"]).returncode:
            return {"why": "pip could not install it"}
        return test(folder, options.workers)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def find_python(version: str) -> str | None:
    """An interpreter of this version that runs: on the path, or one of pyenv's."""
    home = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [f"python{version}", *map(str, home.glob(f"versions/{version}.*/bin/python"))]
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(shutil.which, candidates):
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return shutil.which(candidate)
    return None


def test(folder: Path, workers: str) -> dict:
    """The versions that are there, and how many tests passed, failed and were skipped."""
    python = folder / "bin" / "python"
    code = """if True:
        import platform
        from importlib.metadata import version
        names = ["torch", "transformers", "lightning"]
        print(platform.python_version(), *[version(name).partition("+")[0] for name in names])
    """
    versions = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    files = [f"tests/test_{name}.py" for name in TESTS]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    began = time.monotonic()
    done = subprocess.run(
        [python, "-m", "pytest", "-n", workers, "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
    )
    (WORK / f"{folder.name}.log").write_text(done.stdout + done.stderr)
    counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    counts.update((word, int(n)) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout))
    if done.returncode and not counts["failed"]:
        counts["failed"] = counts["error"] or 1
    return {"versions": versions, **counts, "seconds": round(time.monotonic() - began)}


def write_table() -> None:
    """Writes the table of what was run here, with "not run" for the rest."""
    rows = []
    for name, wanted in COMBINATIONS.items():
        file = WORK / f"{name}.json"
        result = json.loads(file.read_text()) if file.exists() else {}
        if "versions" in result:
            counts = f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"
            rows.append([*result["versions"], counts])
        else:
            why = f"{NOT_RUN}: {result['why']}" if result else NOT_RUN
            rows.append([*(version or "newest" for version in wanted), why])
    lines = ["| Python | torch | transformers | Lightning | tests |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    page = PAGE.read_text()
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    PAGE.write_text("\n".join([before + MARKS[0], *lines, "", MARKS[1] + after]))


if __name__ == "__main__":
    main()
