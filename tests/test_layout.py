"""The tree keeps its shape: who may import whom, how long a file may be, and what must not be in any of them."""

from __future__ import annotations

import ast
import functools
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("csrc", "kernels", "models", "engine")  # each may import those to its left
COMMANDS = ("scripts", "benchmarks")

# Distributions that a layer may import, beside the standard library and the layers below it.
ALLOWED = {
    "csrc": set(),
    "kernels": {"torch", "triton", "numpy"},
    "models": {"torch", "triton", "numpy"},
    "models/weights": {"torch", "triton", "numpy", "safetensors"},
    "benchmarks": {"torch", "triton", "numpy"},
}
# The part of the engine that must run where nothing but torch is installed (benchmarks run it there).
LEAN = ("engine/step.py", "engine/optim.py", "engine/schedule.py", "engine/scaler.py", "engine/data/packing.py")

# What a machine that only measures need not have.
NOT_EVERYWHERE = (
    "PIL", "rich", "yaml", "omegaconf", "tyro", "safetensors", "sentencepiece", "tokenizers", "bitsandbytes",
    "transformers", "peft", "tensorboard", "matplotlib",
)  # fmt: skip

FORBIDDEN = {
    r"\bpickle\b": "checkpoints are safetensors and JSON",
    r"weights_only\s*=\s*False": "a file must not run code",
    r"(?<![\w.])(eval|exec)\(": "a text must not run as code",
    r"shell\s*=\s*True|os\.system\(": "commands are lists of words",
    r"trust_remote_code": "code comes from this repository only",
    r"\byaml\.(unsafe_|full_)?load\(": "yaml.safe_load",
    r"^\s*from \S+ import \*": "star imports hide where a name is from",
    r"except (Base)?Exception:\s*pass\b": "an error is never swallowed",
    r"0\.0\.0\.0": "servers listen on localhost",
}
# Where a forbidden word is the point: the reader of other projects' .pth files names what it refuses.
NAMES_PICKLE = ("models/weights",)


def sources(*folders: str) -> list[Path]:
    """The tracked kind of Python files: those under the named folders, or all of the project's without tests."""
    if folders:
        return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted([*ROOT.glob("*.py"), *sources(*LAYERS, *COMMANDS)])


def cuda() -> list[Path]:
    return sorted(path for end in ("*.cu", "*.cuh", "*.h") for path in (ROOT / "csrc").glob(end))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at module level) of a file's imports; TYPE_CHECKING blocks run nothing and are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(child for statement in node.body for child in ast.walk(statement))
    top = {child for statement in tree.body for child in _executed_on_import(statement)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} imports relatively"
            yield node.module or "", node in top


def _executed_on_import(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _executed_on_import(child)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer: str) -> None:
    above = {*LAYERS[LAYERS.index(layer) + 1 :], *COMMANDS, *(path.stem for path in ROOT.glob("*.py")), "tests"}
    wrong = [
        f"{name(path)} imports {module}"
        for path in sources(layer)
        for module, _ in imports(path)
        if module.partition(".")[0] in above
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", ALLOWED)
def test_lower_layers_need_few_distributions(folder: str) -> None:
    inner = [other for other in ALLOWED if other.startswith(f"{folder}/")]
    paths = [path for path in sources(folder) if not name(path).startswith(tuple(inner))] if inner else sources(folder)
    wrong = [
        f"{name(path)} imports {module}"
        for path in paths
        for module, at_top in imports(path)
        if at_top and _distribution(module) not in ALLOWED[folder] | {None}
    ]
    assert wrong == []


def test_step_packer_and_optimiser_import_torch_and_numpy_only() -> None:
    """Told by a fresh interpreter, so that what they import in turn counts too."""
    modules = [path.removesuffix(".py").replace("/", ".") for path in LEAN]
    assert all((ROOT / path).is_file() for path in LEAN), "name the successor of what is gone"
    script = f"""
import importlib, sys
import numpy, torch, triton
before = set(sys.modules)
for module in {modules}:
    importlib.import_module(module)
print(*sorted({{module.partition(".")[0] for module in set(sys.modules) - before}}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    brought = {module for module in done.stdout.split() if module not in sys.stdlib_module_names}
    assert brought - {"torch", "triton", "numpy", *LAYERS} == set()


def test_benchmarks_run_where_only_torch_triton_and_numpy_are_installed() -> None:
    """Every module of theirs is imported, and a whole step is run, counted and predicted, in an interpreter that has
    nothing else of what the project installs."""
    modules = [name(path).removesuffix(".py").replace("/", ".") for path in sources("benchmarks")]
    script = f"""
import importlib, sys
for gone in {NOT_EVERYWHERE}:
    sys.modules[gone] = None
for module in {modules}:
    importlib.import_module(module)
import torch
from benchmarks import end_to_end, plan_check
from benchmarks.problem import Case
from engine.plan.cards import CARDS
from models.vlm import VLMConfig
from tests.benchmarks.made_up_rows import ORIGIN
shape = {{"model": "toy", "T": 128, "samples": 1, "policy": "auto", "cap": 0}}
(row,) = end_to_end.rows(Case("end_to_end", shape, modes=("step",)), torch.device("cpu"), ORIGIN, True)
found = plan_check.prediction(row)
print(row.failure, row.ms > 0, found.bytes > 0, found.tokens_per_s > 0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["None", "True", "True", "True"], done.stderr


def _distribution(module: str) -> str | None:
    """The top-level package of a third party, or None for the standard library and for what is ours."""
    top = module.partition(".")[0]
    return None if top in sys.stdlib_module_names or top in (*LAYERS, *COMMANDS) else top


def test_files_are_short() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in [*sources(), *cuda()]}
    assert {path: length for path, length in lengths.items() if length > 700} == {}
    written = [length for length in lengths.values() if length > 5]  # without the __init__.py of one line
    assert statistics.median(written) <= 180


def test_commands_are_thin() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("*.py")}
    lengths.pop("setup.py", None)
    assert {path: length for path, length in lengths.items() if length > 90} == {}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_forbidden_constructs(pattern: str) -> None:
    found = []
    for path in sources():
        if "pickle" in pattern and name(path).startswith(NAMES_PICKLE):
            continue
        found += [f"{name(path)}: {hit.group().strip()}" for hit in re.finditer(pattern, code(path), re.MULTILINE)]
    assert found == [], FORBIDDEN[pattern]


@functools.cache
def code(path: Path) -> str:
    """The file without comments and docstrings, which may say what is not done."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant("")
    return ast.unparse(tree)


def test_nothing_is_left_for_later() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert [name(path) for path in [*sources(), *cuda()] if marks.search(path.read_text(encoding="utf-8"))] == []


def test_code_is_ascii() -> None:
    wrong = [name(path) for path in [*sources(), *cuda()] if not path.read_text(encoding="utf-8").isascii()]
    assert wrong == []


def test_csrc_serves_every_torch_and_python() -> None:
    """It includes headers of CUDA, of C++ and its own, and its interface is plain C."""
    included = {header for path in cuda() for header in re.findall(r'#include [<"](.+)[>"]', path.read_text())}
    foreign = ("torch", "ATen", "c10", "Python", "pybind11", "cutlass", "cub", "thrust")
    assert included and [header for header in included if re.match(rf"({'|'.join(foreign)})\b", header)] == []
    done = subprocess.run(["gcc", "-x", "c", "-std=c99", "-fsyntax-only", ROOT / "csrc/nibble.h"], check=False)
    assert done.returncode == 0


def test_every_file_defers_annotations() -> None:
    """`from __future__ import annotations` in each file that has code beyond its docstring."""
    wrong = [
        name(path)
        for path in sources()
        if len(ast.parse(path.read_text(encoding="utf-8")).body) > 1
        and not any(module == "__future__" for module, _ in imports(path))
    ]
    assert wrong == []


def test_nothing_is_installed_under_our_names() -> None:
    """pyproject.toml configures tools; `pip install .` must not put `engine` or `kernels` into an environment.

    tests/csrc/test_build.py looks into what it does install.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "[project]" not in text
    assert "[build-system]" not in text
    assert re.findall(r"packages=(.*),", (ROOT / "setup.py").read_text(encoding="utf-8")) == ['["nibble_csrc"]']


def test_every_requirement_is_pinned() -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    wanted = {
        line.partition(";")[0].strip()
        for file in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / file).read_text().splitlines()
        if line and not line.startswith(("#", "-"))
    }
    (extras,) = re.findall(r"extras_require=(\{.*?\})", (ROOT / "setup.py").read_text(encoding="utf-8"))
    wanted |= {name for names in ast.literal_eval(extras).values() for name in names}
    assert wanted == set(pinned)
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")
