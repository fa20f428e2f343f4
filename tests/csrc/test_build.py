"""csrc/build.py and setup.py: a library appears whole or not at all, says what it is, and is a wheel elsewhere.

nvcc is played by a script that hands its words to g++ without those about cards.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csrc import build
from csrc.build import BuildError, Built, NoCompilerError

ROOT = Path(__file__).parents[2]
ONE = """
extern "C" const char* nibble_sources() { return NIBBLE_SOURCES; }
extern "C" int nibble_one() { return 1; }
extern "C" int hidden() { return 2; }
"""
NVCC = f"""#!{sys.executable}
import os, pathlib, sys
words = sys.argv[1:]
if words == ["--list-gpu-code"]:
    print("sm_75 sm_80 sm_90 sm_121".replace(" ", chr(10)))
elif words == ["--version"]:
    print("Cuda compilation tools, release 12.8, V12.8.93")
else:
    with pathlib.Path(__file__).with_name("calls").open("a") as calls:
        calls.write(" ".join(words) + chr(10))
    words = [w for w in words if not w.startswith(("-gencode", "--cudart", "-O3"))]
    if "--threads" in words:
        del words[words.index("--threads") : words.index("--threads") + 2]
    words = [w.replace("-Xcompiler=", "").replace("-Xlinker=", "-Wl,") for w in words]
    if "-shared" in words and pathlib.Path(__file__).with_name("full").exists():
        pathlib.Path(words[words.index("-o") + 1]).write_text("half of it")
        sys.exit("No space left on device")
    before = ["-x", "c++", "-include", "{ROOT}/csrc/emulator.h"] if "-c" in words else []
    os.execvp("g++", ["g++", *before, *words])
"""


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only one that is found; it notes what it was called with in a file beside it."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    path = home / "bin/nvcc"
    path.write_text(NVCC)
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    return path


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.cu").write_text(ONE)
    (folder / "emulator.h").write_text("")
    return folder


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)


def calls(nvcc: Path) -> list[str]:
    return nvcc.with_name("calls").read_text().splitlines()


def test_a_library_says_what_it_is_and_exports_its_interface(nvcc: Path, sources: Path, tmp_path: Path) -> None:
    out = build.build(tmp_path / "new/lib.so", folder=sources)
    digest = build.sources_hash(sources)
    assert build.built(out) == Built(digest, (80, 90), 90, "CUDA 12.8")
    library = ctypes.CDLL(str(out))
    library.nibble_sources.restype = ctypes.c_char_p
    assert (library.nibble_one(), library.nibble_sources().decode()) == (1, digest)
    with pytest.raises(AttributeError):
        library.hidden()
    assert sorted(path.name for path in out.parent.iterdir()) == ["lib.lock", "lib.so"]


def test_a_folder_may_have_any_name(nvcc: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of exports goes to the linker through nvcc, which takes what is for it apart."""
    out = build.build(tmp_path / "one, two/lib.so", folder=sources)
    assert "-Xlinker=--version-script=exports" in calls(nvcc)[-1].split()
    monkeypatch.chdir(tmp_path)
    assert build.build_emulated(Path("three, four/lib.so"), sources).exists() and out.exists()


def test_every_card_and_ptx_of_the_newest_are_asked_for(nvcc: Path, sources: Path, tmp_path: Path) -> None:
    build.build(tmp_path / "lib.so", folder=sources)
    asked = [set(re.findall(r",code=(\w+)", line)) for line in calls(nvcc)]
    assert asked == [{"sm_80", "sm_90", "compute_90"}] * 3  # two compiled, one linked
    with pytest.raises(BuildError, match=r"knows 80, 90 of our cards, not 86$"):
        build.build(tmp_path / "lib.so", [80, 86], folder=sources)


def test_it_is_built_again_only_for_other_sources_or_more_cards(nvcc: Path, sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "lib.so"

    def compilations(*archs: int) -> int:
        nvcc.with_name("calls").write_text("")
        build.build(out, archs, folder=sources)
        return len(calls(nvcc))

    assert compilations(90) == 3
    assert compilations(90) == 0
    assert compilations() == 3
    assert compilations(80) == compilations() == 0
    (sources / "two.cuh").write_text("// new")
    assert compilations(80) == 3
    (sources / "notes.py").write_text("")
    assert compilations(80) == 0
    out.write_bytes(b"not a library")
    assert compilations(80) == 3


def test_what_is_up_to_date_needs_no_permission_to_write(
    nvcc: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = build.build(tmp_path / "lib.so", folder=sources)

    def refuse(_: Path) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(build, "_locked", refuse)
    assert build.build(out, folder=sources) == out
    with pytest.raises(PermissionError):
        build.build(tmp_path / "other.so", folder=sources)


def test_the_hash_is_of_names_and_contents(sources: Path) -> None:
    before = build.sources_hash(sources)
    (sources / "one.cu").rename(sources / "two.cu")
    renamed = build.sources_hash(sources)
    (sources / "two.cu").write_text(ONE + " ")
    assert len({before, renamed, build.sources_hash(sources)}) == 3


def test_a_failed_build_leaves_what_was_there(nvcc: Path, sources: Path, tmp_path: Path) -> None:
    out = build.build(tmp_path / "new/lib.so", folder=sources)
    before = out.read_bytes()
    (sources / "wrong.cu").write_text("int f() { return one_that_is_not_there; }")
    with pytest.raises(BuildError, match=r"(?s)nvcc .*wrong\.cu.*ended with 1.*one_that_is_not_there"):
        build.build(out, folder=sources)
    (sources / "wrong.cu").unlink()
    (sources / "two.cuh").touch()
    nvcc.with_name("full").touch()
    with pytest.raises(BuildError, match=r"No space left on device$"):
        build.build(out, folder=sources)
    assert out.read_bytes() == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["lib.lock", "lib.so"]


def test_processes_that_build_at_once_build_once(nvcc: Path, sources: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        built = list(pool.map(lambda _: build.build(tmp_path / "lib.so", folder=sources), range(3)))
    assert built == [tmp_path / "lib.so"] * 3 and len(calls(nvcc)) == 3


def test_the_emulated_library(sources: Path, tmp_path: Path) -> None:
    out = build.build_emulated(tmp_path / "lib.so", folder=sources)
    about = build.built(out)
    assert about is not None and (about.sources, about.archs, about.ptx) == (build.sources_hash(sources), (), 0)
    assert ctypes.CDLL(str(out)).nibble_one() == 1
    stamp = out.stat().st_mtime_ns
    assert build.build_emulated(out, folder=sources).stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("archs", "ptx", "runs", "does_not"),
    [((80, 86), 0, (80, 86, 87, 89), (75, 90, 120)), ((80, 90), 90, (80, 90, 100, 120), (75,)), ((), 0, (), (80,))],
)
def test_which_cards_are_covered(
    archs: tuple[int, ...], ptx: int, runs: tuple[int, ...], does_not: tuple[int, ...]
) -> None:
    about = Built("", archs, ptx, "")
    assert [card for card in (*runs, *does_not) if about.covers(card)] == list(runs)


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(name: str) -> Path:
        path = tmp_path / name / "bin/nvcc"
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
        return path

    home, path, package = place("home"), place("path"), place("site/nvidia/cu13")
    monkeypatch.setenv("CUDA_HOME", str(home.parents[1]))
    monkeypatch.setenv("CUDA_PATH", "")
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setattr(build, "USUAL", tmp_path / "usual")
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path / "site")])
    assert build.find_nvcc() == home
    monkeypatch.delenv("CUDA_HOME")
    assert build.find_nvcc() == path
    monkeypatch.setenv("PATH", "")
    old, new = place("usual/cuda-12.9"), place("usual/cuda-12.10")
    assert build.find_nvcc() == new
    new.chmod(0o644)
    assert build.find_nvcc() == old
    shutil.rmtree(tmp_path / "usual")
    assert build.find_nvcc() in (package, *(Path(sys.prefix).glob("lib/*/site-packages/nvidia/*/bin/nvcc")))


@pytest.mark.usefixtures("no_nvcc")
def test_without_nvcc(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lib.so"
    with pytest.raises(NoCompilerError, match="install the CUDA toolkit, or do without: bitsandbytes"):
        build.build(out, folder=sources)
    assert build.main(["--out", str(out)]) == 4
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error[environment]: csrc was not built\nnvcc is not here")
    assert build.main(["--out", str(out), "--optional"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and "bitsandbytes" in printed.out and printed.err == ""


def test_what_was_built_needs_no_nvcc(
    nvcc: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = build.build(tmp_path / "lib.so", folder=sources)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.build(out, folder=sources) == build.build(out, [80], folder=sources) == out
    with pytest.raises(NoCompilerError):
        build.build(out, [86], folder=sources)


def test_a_failure_is_an_error_even_where_the_library_is_optional(
    nvcc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nvcc.write_text("#!/bin/sh\necho no licence\nexit 3\n")
    assert build.main(["--out", str(tmp_path / "lib.so"), "--optional"]) == 4
    assert "ended with 3:\nno licence" in capsys.readouterr().err


def test_a_wrong_flag_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build.main(["--arch", "sm_80"])
    assert "--arch takes numbers" in capsys.readouterr().err


def copied_tree(folder: Path) -> Path:
    """What a wheel is made of, and what must not get into it."""
    folder.mkdir()
    for path in [ROOT / name for name in ("setup.py", "MANIFEST.in", "pyproject.toml", "CHANGELOG.md", "LICENSE")]:
        shutil.copy2(path, folder / path.name)
    for package in ("csrc", "kernels"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def pip(*words: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | {"PIP_NO_INDEX": "1"})


def test_the_wheel_has_the_library_and_nothing_else(nvcc: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "70.1")
    tree = copied_tree(tmp_path / "tree")
    done = pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    version = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version is not None
    assert re.fullmatch(rf"nibble-{version[1]}-py3-none-(many)?linux\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert files == {"nibble_csrc/__init__.py", "nibble_csrc/libnibble.so"}
        (about,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/WHEEL"))
    assert "Root-Is-Purelib: false" in about
    assert sorted(path.name for path in tree.iterdir() if path.name not in ("build", "csrc", "kernels")) == [
        "CHANGELOG.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py",
    ]  # fmt: skip

    installed = tmp_path / "site"
    done = pip("install", "--no-deps", "--target", installed, wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(tree / "build")
    look = "from kernels import library; print(library.found()[0], library.missing())"
    line = [sys.executable, "-c", look]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"}
    environment |= {"PYTHONPATH": f"{tree}:{installed}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(line, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(installed / "nibble_csrc/libnibble.so")], done.stdout + done.stderr


def test_a_source_distribution_has_what_the_wheel_is_made_of(nvcc: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "70.1")
    tree = copied_tree(tmp_path / "tree")
    line = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "dist")]
    done = subprocess.run(line, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    done = pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", archive)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_without_nvcc_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "70.1")
    tree = copied_tree(tmp_path / "tree")
    source = tree / "csrc/build.py"
    source.write_text(
        source.read_text().replace("def find_nvcc() -> Path | None:", "def find_nvcc():\n    return\n", 1)
    )
    done = pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", tree)
    assert done.returncode == 1
    assert "nvcc is not here" in done.stdout + done.stderr
    assert "A wheel that was built elsewhere needs no nvcc" in done.stdout + done.stderr
