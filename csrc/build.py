"""Builds csrc/ into a shared library with a plain C interface: build/csrc/libnibble.so, with nvcc.

    python -m csrc.build                 for every card that the toolkit knows of ARCHS
    python -m csrc.build --emulated      the same kernels for the CPU, in csrc/emulator.h, with g++: they are tested so

One library serves every torch and Python: it has no torch headers, and its CUDA runtime is inside. It appears whole or
not at all, and is left alone where it has these sources and these cards. Exit code 4 where a compiler is missing or
fails; --optional makes a missing nvcc one line and 0. Standard library only: setup.py and doctor.py run it before
anything is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
LIBRARY = ROOT / "build/csrc/libnibble.so"
EMULATED = ROOT / "build/csrc/libnibble_emulated.so"
ARCHS = (80, 86, 89, 90, 100, 103, 120)  # compute capabilities; an older toolkit builds those of them that it knows

FLAGS = ("-O3", "-std=c++17")
EMULATED_FLAGS = ("-O2", "-std=c++17", "-ffp-contract=off", "-fPIC")  # no sum and product are fused by the compiler
EXPORTS = "{ global: nibble_*; local: *; };"  # the CUDA runtime inside stays inside: torch has one of its own
USUAL = Path("/usr/local")
MARK = b"nibble build "  # stands before the description in the library's bytes
WITHOUT = "bitsandbytes' kernels will do the 4-bit work on a GPU"


class BuildError(RuntimeError):
    """A compiler is missing or failed; the text has its output."""

    exit_code = 4


class NoCompilerError(BuildError):
    """It is missing."""


@dataclass(frozen=True, slots=True)
class Built:
    """What a library was built from and for."""

    sources: str  # sources_hash()
    archs: tuple[int, ...]  # with machine code; none for the emulated one
    ptx: int  # what newer cards compile themselves, 0: nothing
    compiler: str  # "CUDA 13.0", "g++"

    def covers(self, capability: int) -> bool:
        """Whether it runs on a card of this compute capability: same major, minor not newer, or from PTX."""
        same = any(arch // 10 == capability // 10 and arch <= capability for arch in self.archs)
        return same or 0 < self.ptx <= capability

    def __str__(self) -> str:
        return f"{self.compiler}, {' '.join(f'sm_{arch}' for arch in self.archs) or 'for the CPU'}"


def sources_hash(folder: Path = FOLDER) -> str:
    """sha256 of everything that decides what a library computes: names and bytes of the sources, flags."""
    digest = hashlib.sha256(repr((FLAGS, EMULATED_FLAGS)).encode())
    for path in sorted(path for end in ("*.cu", "*.cuh", "*.h") for path in folder.glob(end)):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def built(library: Path) -> Built | None:
    """Description of a library, read from its bytes without loading it; None where there is no library of ours."""
    try:
        content = library.read_bytes()
    except OSError:
        return None
    found = re.search(re.escape(MARK) + rb"(\{[^\0]*\})\0", content)
    if found is None:
        return None
    fields = json.loads(found[1])
    return Built(**fields | {"archs": tuple(fields["archs"])})


def find_nvcc() -> Path | None:
    """The CUDA compiler: of CUDA_HOME or CUDA_PATH, in PATH, in /usr/local, or of a pip package."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [home / "bin/nvcc" for home in homes]
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    candidates += [home / "bin/nvcc" for home in sorted(USUAL.glob("cuda*"), key=_by_number)]
    packages = dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages()])
    candidates += [nvcc for folder in packages for nvcc in sorted(Path(folder).glob("nvidia/*/bin/nvcc"))]
    return next((nvcc for nvcc in candidates if os.access(nvcc, os.X_OK) and nvcc.is_file()), None)


def _by_number(home: Path) -> tuple[int, ...]:
    """Sorts cuda (what the machine's owner chose) first, then cuda-13.0, cuda-12.9, cuda-12.10 by falling number."""
    numbers = [-int(number) for number in re.findall(r"\d+", home.name)]
    return tuple(numbers) if numbers else (-(10**6),)


def find_cxx() -> str | None:
    """The C++ compiler of the emulated library."""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next(filter(None, map(shutil.which, names)), None)


def known_archs(nvcc: Path) -> tuple[int, ...]:
    """Those of ARCHS that this toolkit compiles for."""
    known = set(re.findall(r"\bsm_(\d+)\b", _run([nvcc, "--list-gpu-code"])))
    return tuple(arch for arch in ARCHS if str(arch) in known)


def build(
    out: Path = LIBRARY,
    archs: Sequence[int] = (),
    jobs: int | None = None,
    folder: Path = FOLDER,
    nvcc: Path | None = None,
) -> Path:
    """Builds `out` for `archs` (default: all that the toolkit knows), unless it is there already.

    A card newer than the newest of them compiles that one's PTX. Raises BuildError.
    """
    nvcc = nvcc or find_nvcc()
    if nvcc is None:
        if _serves(built(out), Built(sources_hash(folder), tuple(archs), 0, "")):
            return out
        raise NoCompilerError(
            "nvcc is not here: not in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda* or a pip package; "
            "install the CUDA toolkit, or do without: " + WITHOUT
        )
    known = known_archs(nvcc)
    wanted = tuple(sorted(archs)) or known
    if unknown := set(wanted) - set(known):
        raise BuildError(f"{nvcc} knows {', '.join(map(str, known))} of our cards, not {', '.join(map(str, unknown))}")
    version = re.search(r"release (\d+\.\d+)", _run([nvcc, "--version"]))
    about = Built(sources_hash(folder), wanted, max(wanted), f"CUDA {version[1] if version else '?'}")
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    code += [f"-gencode=arch=compute_{about.ptx},code=compute_{about.ptx}"]
    jobs = jobs or len(os.sched_getaffinity(0))
    files = max(1, len(list(folder.glob("*.cu"))))
    compile_ = [str(nvcc), *FLAGS, *code, "--threads", str(max(1, jobs // files)), "-Xcompiler=-fPIC", "-c"]
    link = [str(nvcc), *code, "-shared", "--cudart=static", "-Xlinker=--as-needed"]
    return _build(out, about, jobs, folder, compile_, link, "-Xlinker=")


def build_emulated(out: Path = EMULATED, folder: Path = FOLDER) -> Path:
    """Builds the same kernels for the CPU, with g++ or clang++. Raises BuildError."""
    cxx = find_cxx()
    if cxx is None:
        raise NoCompilerError("no C++ compiler is here: install g++, or name one in CXX")
    about = Built(sources_hash(folder), (), 0, Path(cxx).name)
    compile_ = [cxx, "-x", "c++", "-include", str(folder / "emulator.h"), *EMULATED_FLAGS, "-c"]
    return _build(out, about, len(os.sched_getaffinity(0)), folder, compile_, [cxx, "-shared"], "-Wl,")


def _build(
    out: Path, about: Built, jobs: int, folder: Path, compile_: list[str], link: list[str], to_linker: str
) -> Path:
    """Each .cu file by itself, all at once; then one library beside `out`, which takes its place."""
    if _serves(built(out), about):
        return out  # nothing is written: the checkout may be somebody else's
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out), TemporaryDirectory(dir=out.parent.resolve(), prefix=".building-") as temporary:
        if _serves(built(out), about):
            return out
        there = Path(temporary)
        text = json.dumps(json.dumps(asdict(about)))  # a C literal too: ASCII
        mark = f'const char nibble_build[] = "{MARK.decode()}" {text};'
        (there / "about.cu").write_text(f'extern "C" {{ extern {mark} }}\n')
        (there / "exports").write_text(EXPORTS)
        sources = [*sorted(folder.glob("*.cu")), there / "about.cu"]
        objects = [str(there / f"{source.stem}.o") for source in sources]
        define = f'-DNIBBLE_SOURCES="{about.sources}"'
        lines = [[*compile_, define, "-o", to, str(source)] for source, to in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(_run, lines))
        new = there / out.name
        # a name without a folder: nvcc and the compilers take what goes to the linker apart at commas and blanks
        _run([*link, f"{to_linker}--version-script=exports", "-o", str(new), *objects], cwd=there)
        new.replace(out)
    return out


def _serves(there: Built | None, about: Built) -> bool:
    return there is not None and there.sources == about.sources and set(about.archs) <= set(there.archs)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One process builds, the others wait and find it built."""
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(words: Sequence[str | Path], cwd: Path | None = None) -> str:
    """What a compiler prints. Raises BuildError with all of it where it fails."""
    try:
        done = subprocess.run(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{words[0]} does not start: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, words))}\nended with {done.returncode}:\n{done.stdout.strip()}")
    return done.stdout


def main(argv: list[str]) -> int:
    """Builds, says what there is now. Returns 0, or 4."""
    parser = argparse.ArgumentParser(
        prog="python -m csrc.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="", help=f"compute capabilities, of {','.join(map(str, ARCHS))}")
    parser.add_argument("--out", type=Path, help="the library (default: where nibble looks for it)")
    parser.add_argument("--jobs", type=int, help="compilers at once (default: one a processor)")
    parser.add_argument("--emulated", action="store_true", help="for the CPU, with g++")
    parser.add_argument("--optional", action="store_true", help="without nvcc say so in a line, and end with 0")
    flags = parser.parse_args(argv)
    if not re.fullmatch(r"(\d+(,\d+)*)?", flags.arch):
        parser.error(f"--arch takes numbers separated by commas, got {flags.arch!r}")
    archs = [int(arch) for arch in flags.arch.split(",") if arch]
    try:
        if flags.emulated:
            library = build_emulated(flags.out or EMULATED)
        else:
            library = build(flags.out or LIBRARY, archs, flags.jobs)
    except BuildError as error:
        if flags.optional and isinstance(error, NoCompilerError):
            print(f"csrc was not built, nvcc is not here: {WITHOUT}")
            return 0
        print(f"error[environment]: csrc was not built\n{error}", file=sys.stderr)
        return error.exit_code
    print(f"{library} ({built(library)})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
