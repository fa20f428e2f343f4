"""Distribution `nibble`: the CUDA library of csrc/ as a wheel for machines without nvcc, and nothing else.

    pip wheel . --no-deps       where nvcc is; install the wheel anywhere beside a checkout of the same sources
    pip install .               both at once
    pip install '.[hub]'        and what downloads models that are named by their Hub ids

nibble itself runs from its checkout. The wheel holds one package, nibble_csrc, which kernels/library.py looks into; it
serves every Python and torch of its platform.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from csrc.build import LIBRARY, BuildError, build  # noqa: E402

PACKAGE = ROOT / "build/package/nibble_csrc"
ABOUT = '"""The CUDA library of nibble, for a checkout with the sources that it was built from."""\n'


class BinaryDistribution(Distribution):
    """Installed where machine code goes."""

    def has_ext_modules(self) -> bool:
        return True


class BuildLibrary(build_py):
    """Puts the library into the package first."""

    def run(self) -> None:
        if self.editable_mode:
            sys.exit("error: nibble runs from its checkout, where `make` builds the library; `pip install .` copies it")
        try:
            shutil.copy(build(LIBRARY), PACKAGE)  # newer than what an earlier wheel left in build/
        except BuildError as error:
            sys.exit(f"error: {error}\nA wheel that was built elsewhere needs no nvcc: pip install nibble-*.whl")
        super().run()


class PlatformWheel(bdist_wheel):
    """Any Python 3, no ABI of it, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def version() -> str:
    """The newest version of CHANGELOG.md."""
    found = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


PACKAGE.mkdir(parents=True, exist_ok=True)
(PACKAGE / "__init__.py").write_text(ABOUT)
setup(
    name="nibble",
    version=version(),
    description="CUDA kernels of nibble: 4-bit and 8-bit frozen weights",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["nibble_csrc"],
    extras_require={"hub": ["huggingface_hub"]},  # models/weights/hub.py; its version is in constraints.txt
    package_dir={"nibble_csrc": str(PACKAGE.relative_to(ROOT))},
    package_data={"nibble_csrc": [LIBRARY.name]},
    options={"egg_info": {"egg_base": "build"}},
    distclass=BinaryDistribution,
    cmdclass={"build_py": BuildLibrary, "bdist_wheel": PlatformWheel},
)
