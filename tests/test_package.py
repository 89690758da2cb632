"""The package as a whole: what importing it needs, what its wheel holds, and that its texts are true."""

import ast
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import typing
import zipfile
from pathlib import Path

import docstring_parser
import pytest
import torch
from torch import nn

import sadam_integrations
from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sadam_integrations"
CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
TEXTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


def python(code, *flags, cwd=ROOT):
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


TORCH_ALONE = """
import importlib.machinery, sys
TORCH = {"torch", "torchgen", "functorch", "filelock", "typing_extensions", "setuptools", "_distutils_hack", "sympy",
         "mpmath", "networkx", "jinja2", "markupsafe", "fsspec"}  # what installing torch brings: not even numpy
find_spec = importlib.machinery.PathFinder.find_spec
def hide(name, path=None, target=None):
    spec = find_spec(name, path, target)
    installed = spec is not None and "site-packages" in (spec.origin or "")
    return None if installed and name.partition(".")[0] not in TORCH else spec
importlib.machinery.PathFinder.find_spec = staticmethod(hide)
import torch
from sadam_integrations.factory import create_optimizer
net = torch.nn.Linear(2, 2)
optimizer = create_optimizer("sadamw", net, lr=0.1)
net(torch.ones(2)).sum().backward()
optimizer.step()
assert all(p.abs().max() < 2 for p in net.parameters())
print({"numpy", "transformers", "lightning", "matplotlib"} & sys.modules.keys())
"""


def test_the_package_needs_torch_alone():
    assert python(TORCH_ALONE) == "set()\n"


def test_so_does_the_command_until_a_recipe_runs(tmp_path):
    code = (
        TORCH_ALONE
        + f"""
from sadam_integrations.cli import main
print([main(words) for words in (["ls"], ["env"], ["cp", "bert", {str(tmp_path)!r}], ["run", "vit"], ["run", "bert"])])
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 2, 2]", done.stderr
    vit, bert = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.fullmatch(
        r'error: vit.py needs \w+, which is not installed: pip install "sadam-integrations\[recipes\]"', vit
    )
    assert re.fullmatch(r'error: .* not found: pip install "sadam-integrations\[recipes\]"', bert)


def test_importing_the_package_imports_nothing_else():
    code = "import sys, torch; before = set(sys.modules); import sadam_integrations; print(*set(sys.modules) - before)"
    new = {name.partition(".")[0] for name in python(code).split()}
    assert new - sys.stdlib_module_names <= {"sadam_integrations", "torch"}


@pytest.mark.parametrize("flags", [(), ("-OO",)], ids=["plain", "-OO"])
def test_importing_warns_of_nothing_and_checks_do_not_rest_on_asserts(flags):
    code = """
import torch, warnings
warnings.simplefilter("error")
import sadam_integrations
for bad in (dict(lr=-1), dict(beta=0), dict(betas=(1, 0))):
    try:
        sadam_integrations.Sadam([torch.zeros(1, requires_grad=True)], **bad)
    except ValueError:
        continue
    raise SystemExit(f"accepted {bad}")
"""
    python(code, *flags)


WITHOUT = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
import sadam_integrations, torch
try:
    import sadam_integrations.{module}
except ImportError as error:
    print(error)
optimizer = sadam_integrations.create_optimizer("sadamw", torch.nn.Linear(2, 2))
optimizer.step()
"""


@pytest.mark.parametrize(
    ("module", "hidden", "extra"),
    [
        ("huggingface", ["transformers", "accelerate"], "transformers"),
        ("lightning", ["lightning", "pytorch_lightning"], "lightning"),
        ("timm", ["timm"], "timm"),
    ],
)
def test_without_an_extra_its_integration_says_what_to_install(module, hidden, extra):
    said = python(WITHOUT.format(module=module, hidden=hidden))
    assert hidden[0] in said and f"sadam-integrations[{extra}]" in said


def test_every_module_for_torch_alone_imports_with_warnings_as_errors_and_without_asserts():
    modules = (
        "sadam_integrations.cli, sadam_integrations.alr, sadam_integrations.launch, sadam_integrations.backends.cpu"
    )
    python(f"import torch, warnings; warnings.simplefilter('error'); import {modules}", "-O")


def test_version_and_type_information():
    version = sadam_integrations.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", version)
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert (PACKAGE / "py.typed").is_file()


def test_every_name_offered_exists_and_is_documented():
    assert sorted(sadam_integrations.__all__) == sorted(set(sadam_integrations.__all__))
    for name in sadam_integrations.__all__:
        value = getattr(sadam_integrations, name)
        assert not callable(value) or inspect.getdoc(value), name


@pytest.mark.parametrize("cls", CLASSES)
def test_other_tools_can_read_the_signature(cls):
    parameters = inspect.signature(cls).parameters
    assert next(iter(parameters)) == "params"
    assert list(parameters) == list(inspect.signature(Sadam).parameters)
    positional = [key for key, value in parameters.items() if value.kind is value.POSITIONAL_OR_KEYWORD]
    assert positional == ["params", "lr", "betas"]
    assert all(value.kind is value.KEYWORD_ONLY for key, value in parameters.items() if key not in positional)
    hints = typing.get_type_hints(cls.__init__)
    assert hints.keys() == {*parameters, "return"}
    assert hints["beta"] == float | typing.Literal["auto"]
    assert hints["betas"] == tuple[float, float]
    assert hints["foreach"] == bool | None


def test_only_the_weight_decay_differs_between_the_defaults():
    for cls, weight_decay in zip(CLASSES, [0.0, 0.0, 1e-2, 1e-2], strict=True):
        defaults = {key: value.default for key, value in inspect.signature(cls).parameters.items() if key != "params"}
        assert defaults == {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "beta": "auto",
            "weight_decay": weight_decay,
            "bias_correction": "inner",
            "maximize": False,
            "foreach": None,
            "fused": None,
            "capturable": False,
            "differentiable": False,
        }, cls.__name__


def documented(node):
    docstring = ast.get_docstring(node) or ""
    return [
        param.arg_name.lstrip("*") for param in docstring_parser.parse(docstring).params if param.args[0] == "param"
    ]


def signature(function):
    args = function.args
    every = [*args.posonlyargs, *args.args, *filter(None, [args.vararg]), *args.kwonlyargs, *filter(None, [args.kwarg])]
    return [arg.arg for arg in every]


def test_docstrings_name_the_arguments_that_exist():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path.name} does not say what it is for"
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and (args := documented(node)):
                inits = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name in ("__init__", "__call__")]
                fields = [f.target.id for f in node.body if isinstance(f, ast.AnnAssign)]
                valid = [arg for init in inits for arg in signature(init)] + fields
                assert set(args) <= set(valid), f"{path.name}: {node.name}"
                seen += 1
            elif isinstance(node, ast.FunctionDef) and (args := documented(node)):
                names = signature(node)
                assert args in (names, names[1:]), f"{path.name}: {node.name}"  # without self, or without any
                seen += 1
    assert seen > 10
    assert documented(ast.parse(inspect.getsource(Sadam)).body[0]) == list(inspect.signature(Sadam).parameters)


def test_the_pins_cover_the_dependencies():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; python_version .*)?", pin) for pin in pins)
    normal = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", pin)[0]).lower() for pin in pins}
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted}
    assert names - {"sadam-integrations", "triton"} <= normal  # which torch's builds for GPUs pin themselves


def build(folder, **environment):
    """Builds a wheel of a copy of the sources: the checkout stays clean."""
    source, out = folder / "source", folder / "wheel"
    shutil.copytree(ROOT, source, ignore=lambda folder, names: [n for n in names if LEFT.fullmatch(n)])
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory):
    return build(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def wheel(wheel_file):
    """What the wheel holds."""
    folder = wheel_file.parent / "unpacked"
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(folder)
    return folder


LEFT = re.compile(r"\..*|build|dist|runs|__pycache__|sadam_integrations\.egg-info|.*\.so")


def files(folder):
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if "__pycache__" not in path.parts and "_recipes" not in path.parts}


def test_the_wheel_holds_the_package_and_the_recipes_alone(wheel):
    info = f"sadam_integrations-{sadam_integrations.__version__}.dist-info"
    assert {path.name for path in wheel.iterdir()} == {"sadam_integrations", info}
    assert files(wheel / "sadam_integrations") == files(PACKAGE)
    recipes = {path for path in files(ROOT / "recipes") if not path.endswith(".md")}
    packed = {str(p.relative_to(wheel / "sadam_integrations/_recipes")) for p in wheel.rglob("_recipes/**/*.*")}
    assert {"bert.py", "bert.yaml", "vit.py", "vit.yaml", "studies/beta.py"} <= recipes
    assert recipes <= packed


def test_the_wheel_says_what_it_is(wheel):
    metadata = next(wheel.glob("*.dist-info/METADATA")).read_text()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    requires = re.findall(r"^Requires-Dist: ((?!.*extra ==).*)$", metadata, re.MULTILINE)
    assert [re.match(r"\w+", requirement)[0] for requirement in requires] == ["torch"]
    assert "Apache License" in next(wheel.glob("*.dist-info/licenses/LICENSE")).read_text()


def test_the_wheel_works_where_the_checkout_is_not(wheel):
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); import sadam_integrations as s; print(s.__file__)"
    assert Path(python(code, cwd=wheel).strip()) == wheel / "sadam_integrations" / "__init__.py"


IN_THE_WHEEL = """
import sys, torch
sys.path.insert(0, {wheel!r})
from sadam_integrations import SadamW, cli
p = torch.nn.Parameter(torch.ones(3))
optimizer = SadamW([p])
p.grad = torch.ones(3)
optimizer.step()
assert (p < 1).all()
cli.main(["env"])
try:
    SadamW([p], fused=True)
except RuntimeError as error:
    print(error)
else:
    print("fused")
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_one_wheel_with_the_kernel_serves_every_python(wheel, wheel_file):
    assert "-cp310-abi3-" in wheel_file.name
    assert len(list(wheel.glob("sadam_integrations/backends/_cpu*.so"))) == 1
    out = python(IN_THE_WHEEL.format(wheel=str(wheel)), cwd=wheel)
    assert out.endswith("\nfused\n") and re.search(r"^a step on a CPU +kernel \(", out, re.MULTILINE)


def test_without_a_compiler_there_is_a_wheel_all_the_same(tmp_path):
    with zipfile.ZipFile(build(tmp_path, CC="false")) as archive:
        archive.extractall(tmp_path / "unpacked")
    assert not list(tmp_path.glob("unpacked/**/*.so"))
    out = python(IN_THE_WHEEL.format(wheel=str(tmp_path / "unpacked")), cwd=tmp_path)
    assert re.search(r"^a step on a CPU +for-loop, .* built without a C compiler; .* rebuild", out, re.MULTILINE)
    assert "fused=True: a parameter is on cpu, and the package was built without a C compiler" in out


@pytest.fixture
def environment(tmp_path):
    """A virtual environment with the packages of this one, except that ours is not installed."""
    folder = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))  # only listed: its own .pth files are not read
    return folder


@pytest.mark.skipif(os.name != "posix", reason="the layout of a virtual environment is another on Windows")
@pytest.mark.parametrize(
    "kind",
    ["wheel", pytest.param("checkout", marks=pytest.mark.slow), pytest.param("editable", marks=pytest.mark.slow)],
)
def test_the_command_runs_wherever_the_package_is(kind, environment, wheel_file, tmp_path):
    cwd, sadam = tmp_path, [environment / "bin" / "sadam"]
    if kind == "wheel":
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            environment / "bin" / "python",
            "install",
            "--no-deps",
            "--no-index",
        ]
        done = subprocess.run([*pip, wheel_file], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    elif kind == "checkout":
        cwd, sadam = ROOT, [environment / "bin" / "python", "-m", "sadam_integrations"]
    else:
        sadam = [Path(sys.executable).with_name("sadam")]

    def told(*words):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": "",
        }
        done = subprocess.run([*sadam, *words], capture_output=True, text=True, cwd=cwd, env=env, timeout=280)
        assert done.returncode == 0, done.stderr
        return done.stdout

    home = {"wheel": environment, "checkout": ROOT, "editable": ROOT}[kind]
    assert re.search(rf"^recipes +{home}/", told("env"), re.MULTILINE)
    assert "\n    vit_imagenet " in told("ls")
    assert "mine/bert.yaml" in told("cp", "bert", tmp_path / "mine")
    for recipe in ("bert", "vit"):
        folder = tmp_path / "runs" / recipe
        last = told("run", recipe, "--smoke", "--output_dir", folder).splitlines()[-1]
        assert re.fullmatch(r"sadamw lr \S+: validation accuracy 0\.\d+, test 0\.\d+, \d+ s -> .*", last)
        files = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        assert files == {
            "result.json",
            "figure.png",
            "alr.jsonl",
            "alr.png",
            "config.yaml",
            "log.txt",
            "recipe.py",
            "model",
        }


def blocks():
    """Every Python block of the README and the docs; docs/lightning.md has tests of its own."""
    for name in TEXTS:
        text = (ROOT / name).read_text()
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if name != "docs/lightning.md":
                yield pytest.param(name, block[1], id=f"{name}, line {text[: block.start(1)].count(chr(10)) + 1}")


@pytest.mark.parametrize(("name", "code"), list(blocks()))
def test_the_python_of_the_texts_runs(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {"__name__": "readme", "torch": torch, "model": nn.Linear(2, 2)})


def switched():
    """The code that the README's three diffs lead to."""
    for diff in re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL):
        yield "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] in "+ ")


def test_the_switches_of_the_readme_run(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    trainer, lightning, plain = switched()
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    names = {"torch": torch, "model": model, "TrainingArguments": transformers.TrainingArguments}
    for code in (trainer, lightning, plain):
        exec(compile(code, "README.md", "exec"), names)
    cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(names["args"])
    assert cls is SadamW and kwargs["lr"] == 2e-4
    for optimizer in (names["configure_optimizers"](model), names["optimizer"]):
        assert type(optimizer) is SadamW
        assert [group["weight_decay"] == 0 for group in optimizer.param_groups] == [False, True]


def anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("text", TEXTS)
def test_the_links_of_the_texts_lead_somewhere(text):
    path = ROOT / text
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", path.read_text())
    for link in filter(lambda link: not re.match(r"[a-z]+:", link), ("".join(pair) for pair in links)):
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), f"{text}: {link}"
        assert not anchor or anchor in anchors(target), f"{text}: {link}: no such heading"
