"""What is installed, which kernels run here and how exact they are: `python doctor.py`, or with `--json`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.doctor import Diagnosis, diagnose
from engine.errors import EnvironmentProblem, run_command

PARTS = {
    "installed": "installed (versions against constraints.txt)",
    "names": "packages of this name",
    "disk": "disk",
    "device": "device",
}


def options(argv: list[str]) -> argparse.Namespace:
    """The flags of this command."""
    parser = argparse.ArgumentParser(prog="doctor.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    parser.add_argument("--output_dir", type=Path, default=Path("runs"), help="where runs will be written")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Look, compute, print. Returns 0, or 4 where something does not work."""
    flags = options(argv)
    diagnosis = diagnose(flags.output_dir)
    print(diagnosis.to_json() if flags.json else as_text(diagnosis))
    return EnvironmentProblem.exit_code if diagnosis.problems else 0


def as_text(diagnosis: Diagnosis) -> str:
    """One aligned line a finding, and below it what to do."""
    width = max(len(name) for name in [*(f.name for f in diagnosis.findings), *(op.op for op in diagnosis.ops)])
    lines = []
    for part, title in PARTS.items():
        found = [finding for finding in diagnosis.findings if finding.part == part]
        lines += [title] if found else []
        for finding in found:
            lines.append(f"  {finding.status:<7}  {finding.name:<{width}}  {finding.text}")
            lines += [f"{'':<{width + 13}}do: {finding.do}"] if finding.do else []
    if diagnosis.ops:
        lines.append("kernels: largest error against the formula in 64 bits, relative to the largest value")
        lines.append(f"  {'':<7}  {'':<{width}}  {'runs on':<9}  forward  backward  allowed")
    for op in diagnosis.ops:
        errors = "  ".join(f"{'-' if e is None else f'{e:.1e}':>{n}}" for e, n in ((op.forward, 7), (op.backward, 8)))
        status = "ok" if op.ok else "problem"
        tail = op.failure or op.why
        lines.append(f"  {status:<7}  {op.op:<{width}}  {op.backend:<9}  {errors}  {op.allowed:>7.0e}  {tail}".rstrip())
    problems = diagnosis.problems
    lines.append(f"problems: {', '.join(problems)}" if problems else "everything here works")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
