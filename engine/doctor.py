"""What doctor.py finds out: what is installed, which kernels run here and how exact they are, where a run can write.

Nothing but the standard library is imported at module level: what is missing here may be why somebody asks.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.demo.cache import BASE_WEIGHTS, cache_root, quantized_weights
from engine.files import is_dir

if TYPE_CHECKING:
    from engine.op_checks import OpCheck

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ((3, 11), (3, 13))
OLDEST = {"torch": (2, 11), "triton": (3, 6)}
OURS = ("engine", "models", "kernels", "csrc")  # top-level packages of this checkout
PROBE_BYTES = 64 * 2**20  # what the disk is tried with
LITTLE_SPACE = 2**30
INSTALL = "make demo, or python -m pip install -r requirements.txt"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `note`: worth knowing, everything works; `problem`: something will fail."""

    part: Literal["installed", "device", "disk", "names"]
    name: str
    text: str
    status: Literal["ok", "note", "problem"] = "ok"
    do: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found out."""

    findings: list[Finding]
    ops: list[OpCheck]

    @property
    def problems(self) -> list[str]:
        """Names of what does not work."""
        return [f.name for f in self.findings if f.status == "problem"] + [op.op for op in self.ops if not op.ok]

    def to_json(self) -> str:
        ops = [asdict(op) | {"ok": op.ok} for op in self.ops]
        findings = [asdict(finding) for finding in self.findings]
        return json.dumps({"problems": self.problems, "findings": findings, "ops": ops}, indent=2)


def diagnose(runs: Path) -> Diagnosis:
    """Looks at everything. `runs` is where run directories will be; nothing is left behind there."""
    findings = [*installed(), *names(), *disk(runs), *demo_cache(), *weight_cache()]
    if any(finding.name in OLDEST and finding.status == "problem" for finding in findings):
        return Diagnosis(findings, [])  # without torch and triton there is no device to look at, and no kernel imports
    from engine.op_checks import check_ops
    from engine.precision import choose_device, choose_dtype

    device = choose_device("auto", 0)
    dtype, why = choose_dtype("auto", device, full_training=False)
    precision = Finding("device", "precision", f"{str(dtype).removeprefix('torch.')} ({why})")
    return Diagnosis([*findings, *devices(), precision], check_ops(device, dtype))


def installed() -> Iterator[Finding]:
    """Python, and every package of requirements.txt against constraints.txt."""
    here = sys.version_info[:2]
    fits = PYTHON[0] <= here <= PYTHON[1]
    allowed = "{}.{} to {}.{}".format(*PYTHON[0], *PYTHON[1])
    text = platform.python_version() + ("" if fits else f", nibble needs {allowed}")
    yield Finding("installed", "python", text, "ok" if fits else "problem", "" if fits else "make PYTHON=python3.12")
    pinned = dict(line.split("==") for line in _lines("constraints.txt"))
    for requirement in _lines("requirements.txt"):
        package = requirement.partition(";")[0].strip()
        yield _package(package, _version(package), pinned[package])


def _package(package: str, version: str | None, pinned: str) -> Finding:
    if version is None:
        return Finding("installed", package, f"missing, {pinned} is pinned", "problem", INSTALL)
    oldest = OLDEST.get(package, (0,))
    public = version.partition("+")[0]
    if tuple(int(part) for part in public.split(".")[: len(oldest)]) < oldest:
        text = f"{version}, nibble needs {'.'.join(map(str, oldest))} or newer"
        return Finding("installed", package, text, "problem", INSTALL)
    try:
        if package in OLDEST:
            importlib.import_module(package)
    except (ImportError, OSError) as error:
        return Finding("installed", package, f"{version}, cannot be imported: {error}", "problem", INSTALL)
    if public != pinned:
        return Finding("installed", package, f"{version}, tested with {pinned}", "note")
    return Finding("installed", package, version)


def devices() -> Iterator[Finding]:
    """Every GPU that torch sees, or the CPU; what Triton needs to launch on one; the variables that choose kernels."""
    import torch

    from engine.environment import device_name

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield Finding("device", f"cuda:{index}", f"{device_name(torch.device('cuda', index))}, {memory}")
    yield from packed_weights()
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        yield Finding("device", "cpu", f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''} of torch")
        if shutil.which("nvidia-smi"):
            build = torch.version.cuda
            text = "there is an NVIDIA driver, but torch sees no GPU"
            why = f"its CUDA {build} does not fit the driver" if build else "this torch is built without CUDA"
            do = "nvidia-smi shows what the driver supports" if build else f"install torch from PyPI: {INSTALL}"
            yield Finding("device", "gpu", f"{text}: {why}", "note", do)
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang", "cc"))), None)
    text = compiler or "none; on a GPU Triton needs one to launch kernels"
    yield Finding("device", "C compiler", text, "ok" if compiler else "note", "" if compiler else "install gcc")
    for name in ("NIBBLE_KERNELS", "TRITON_INTERPRET", "NIBBLE_EMULATE"):
        if name in os.environ:
            yield Finding("device", name, f"is set to {os.environ[name]!r}", "note")


def packed_weights() -> Iterator[Finding]:
    """What does the 4-bit work on each kind of GPU, and why; without a GPU whether csrc's library is there."""
    import torch

    from kernels import library
    from kernels.dequantize_nf4 import backend_of
    from kernels.dispatch import BackendError

    found = library.found()
    there = f"{found[0]} ({found[1]})" if found else ""
    if not torch.cuda.is_available():
        text = there or f"a CPU does without; {library.missing()}"
        yield Finding("device", "4-bit kernels", text, "ok" if there else "note")
        return
    kinds = {torch.cuda.get_device_capability(i): i for i in reversed(range(torch.cuda.device_count()))}
    for index in sorted(kinds.values()):
        x = torch.empty(0, dtype=torch.float16, device=torch.device("cuda", index))
        missing = library.available_for(x)
        try:
            backend = backend_of(x)
        except BackendError as error:
            yield Finding(
                "device", "4-bit kernels", f"nothing unpacks 4-bit weights on cuda:{index}", "problem", str(error)
            )
            continue
        who = {"cuda": there, "bitsandbytes": "bitsandbytes' CUDA kernels"}.get(backend, backend)
        text = f"{who} for 4-bit weights on cuda:{index}"
        yield Finding("device", "4-bit kernels", f"{text}: {missing}" if missing else text, "note" if missing else "ok")


def disk(runs: Path) -> Iterator[Finding]:
    """Free space where runs are kept, and how fast a file gets there for good."""
    folder = _nearest(runs)
    chunk = os.urandom(2**20)  # not compressible
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for start in range(0, PROBE_BYTES, len(chunk)):
                file.write(chunk[: PROBE_BYTES - start])
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
    except OSError as error:
        text, do = f"{folder} cannot be written: {error.strerror}", "name another place with --output_dir"
        yield Finding("disk", "runs", text, "problem", do)
        return
    free = shutil.disk_usage(folder).free
    text = f"{runs.absolute()}: {free / 2**30:,.1f} GiB free, writes {PROBE_BYTES / seconds / 1e6:,.0f} MB/s"
    little = free < LITTLE_SPACE
    yield Finding("disk", "runs", text, "note" if little else "ok", "--plan says what a run writes" if little else "")


def demo_cache() -> Iterator[Finding]:
    """Where the embedded demo is unpacked on first use."""
    root = cache_root()
    if not BASE_WEIGHTS.is_file():
        yield Finding("disk", "demo", f"{BASE_WEIGHTS} is not there", "note", "git checkout engine/demo")
    if not os.access(_nearest(root), os.W_OK):
        yield Finding(
            "disk", "demo cache", f"{root} cannot be written", "problem", "set NIBBLE_CACHE to another folder"
        )
        return
    made = sorted(path.name for path in root.glob("demo-*")) if is_dir(root) else []
    yield Finding("disk", "demo cache", f"{root}: {', '.join(made) or 'empty, the first demo fills it'}")


def weight_cache() -> Iterator[Finding]:
    """What is kept of models that were quantized once. Nobody removes what was made from files that are gone."""
    root = quantized_weights()
    try:
        found = sorted(path for path in root.iterdir() if path.is_dir())
        sizes = {path.name: sum(file.stat().st_size for file in path.iterdir() if file.is_file()) for path in found}
    except FileNotFoundError:
        sizes = {}
    except OSError as error:
        do = "set NIBBLE_CACHE to another folder, or every start reads and quantizes the weights again"
        yield Finding("disk", "weight cache", f"{error.filename} cannot be read: {error.strerror}", "note", do)
        return
    if not sizes:
        yield Finding("disk", "weight cache", f"{root}: empty, the first start with real weights fills it")
        return
    each = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in sizes.items() if not name.startswith("."))
    text = f"{root}: {sum(sizes.values()) / 2**30:.2f} GiB ({each or 'none whole'}); "
    text += "what is no longer wanted may be deleted"
    if unfinished := sum(size for name, size in sizes.items() if name.startswith(".")):
        text += f"; {unfinished / 2**30:.2f} GiB are unfinished: the next start that keeps weights removes them"
    yield Finding("disk", "weight cache", text)


def names() -> Iterator[Finding]:
    """Whether engine, models and kernels are this checkout's (Hugging Face has a distribution `kernels`)."""
    by_import = metadata.packages_distributions()
    for name in OURS:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin if spec and spec.origin else "nowhere").resolve()
        others = sorted(set(by_import.get(name, [])))
        if origin.parent != ROOT / name:
            do = f"run the commands in {ROOT}, without PYTHONSAFEPATH and python -P"
            yield Finding("names", name, f"is taken from {origin.parent}", "problem", do)
        elif others:
            text = (
                f"ours, but {', '.join(others)} is installed too: our commands take ours, and so does any library "
                f"in them that wants the other"
            )
            do = f"use the .venv of make, or python -m pip uninstall {' '.join(others)}"
            yield Finding("names", name, text, "note", do)
        else:
            yield Finding("names", name, "ours")


def _lines(name: str) -> list[str]:
    """A requirements file without comments and options."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith(("#", "-"))]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nearest(path: Path) -> Path:
    """The path itself, or the closest folder above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if is_dir(folder))
