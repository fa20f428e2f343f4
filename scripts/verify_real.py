"""Score a published LaVIN adapter on the real weights and compare with its published figure.

    make verify-real ARGS="--model 7b-lite --llama_model_path W/ --data_root D/ --adapter_path sqa-llama-7b-lite.pth"

For whoever has LLaMA's weights, ScienceQA and one of the authors' adapter files. Flags that are not listed by --help go
to eval.py as they are (--runtime.tokens_per_batch 8192, --legacy.decode_positions, --num 100, ...).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError, DataError, run_command

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Published:
    """An adapter file of LaVIN's model zoo and its average accuracy on ScienceQA's test split, in percent."""

    size: str
    accuracy: float
    bits: str = "16bit"
    vicuna: bool = False

    @property
    def temperature(self) -> str:
        """Of the router: it is not in the file."""
        return "10" if self.size == "7B" else "5"


PUBLISHED = {
    "7b-lite": Published("7B", 88.35, bits="4bit"),
    "13b-lite": Published("13B", 89.44, bits="4bit"),
    "7b": Published("7B", 89.37),
    "vicuna-7b": Published("7B", 89.41, vicuna=True),
    "13b": Published("13B", 90.54),
}


def main(argv: list[str]) -> int:
    """0 where the score is within the tolerance of the published one, 1 where it is not."""
    parser = argparse.ArgumentParser(prog="verify_real", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=PUBLISHED, default="7b-lite", help="which of the published adapters it is")
    parser.add_argument(
        "--llama_model_path", type=Path, required=True, help="folder with tokenizer.model and 7B/, 13B/"
    )
    parser.add_argument("--data_root", type=Path, required=True, help="folder with problems.json and images/")
    parser.add_argument("--adapter_path", type=Path, required=True, help="the adapter file")
    parser.add_argument("--bits", help="instead of the bits it was published with")
    parser.add_argument("--tolerance", type=float, default=0.5, help="in percent points")
    known, rest = parser.parse_known_args(argv)
    published = PUBLISHED[known.model]
    check_files(known.llama_model_path, known.data_root, known.adapter_path, published)
    line = ["--ckpt_dir", str(known.llama_model_path), "--llm_model", published.size]
    line += ["--data_root", str(known.data_root), "--adapter_path", str(known.adapter_path), "--split", "test"]
    line += ["--temperature", published.temperature, "--visual_adapter_type", "router", "--n_prompt", "6"]
    line += ["--bits", known.bits or published.bits, "--generate"]  # as the published figures were scored
    if published.vicuna:
        line += ["--use_vicuna", "--legacy.vicuna_permutation"]
    accuracy = evaluate([*line, *rest])
    passed = abs(accuracy - published.accuracy) <= known.tolerance
    print(
        f"{'PASS' if passed else 'FAIL'} {known.model}: {accuracy:.2f} % on ScienceQA test, "
        f"published {published.accuracy:.2f} %, tolerance {known.tolerance:g}"
    )
    return 0 if passed else 1


def check_files(weights: Path, data: Path, adapter: Path, published: Published) -> None:
    """Raises the error of a file that is missing before anything is loaded."""
    needed = [weights / published.size, weights / "tokenizer.model", adapter]
    needed += [data / "weights" / f"vicuna_{published.size}"] if published.vicuna else []
    for path in needed:
        if not path.exists():
            raise CheckpointError(f"{path} is not there", do="lay the weights out as LaVIN does: recipes/lavin-*.yaml")
    for name in ("problems.json", "pid_splits.json", "images/test"):
        if not (data / name).exists():
            raise DataError(f"{data / name} is not there", do="get ScienceQA from github.com/lupantech/ScienceQA")


def evaluate(line: list[str]) -> float:
    """Run eval.py with these flags and return the average accuracy that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.json"
        command = [sys.executable, str(ROOT / "eval.py"), *line, "--output", str(scores)]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise SystemExit(code)  # eval.py has said why
        return float(json.loads(scores.read_text(encoding="utf-8"))["accuracy"]["average"])


if __name__ == "__main__":
    sys.exit(run_command(main))
