"""Compiles every Triton kernel of kernels/ for bf16 activations, without a GPU; prints one JSON object a line.

A program of its own: with TRITON_INTERPRET=1, as the tests run, triton cannot compile.
"""

from __future__ import annotations

import importlib
import json
import pkgutil

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

import kernels
from kernels.dispatch import launch

CHANNELS = 4096
POINTERS = {"row_ptr": "*i32", "seed_ptr": "*i64"}
ACTIVATIONS = "x y z a dx dy dz da weight"  # bf16, with RMSNorm's weight; other pointers are fp32, LayerNorm's too
POINTERS |= {f"{name}_ptr": "*bf16" for name in ACTIVATIONS.split()}
FLOATS = ("eps", "scale", "kept_scale")
ALIGNED = ("channels", "x_stride", "dy_stride")  # multiples of 16, as launched for every model's width
CONSTANTS = {"H": 8, "K": 16, "PRECISION": "tf32", "LAYER_NORM": True, "ACT": "gelu"}


def compile_kernel(name: str, function: JITFunction, arch: int) -> dict[str, object]:
    config = launch(name, CHANNELS)
    constants = CONSTANTS | {"ROWS": config.rows, "COLS": config.cols, "CHUNK": config.chunk}
    signature, constexprs, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constexprs[(i,)] = constants[parameter.name]
        elif parameter.name.endswith("_ptr"):
            signature[parameter.name] = POINTERS.get(parameter.name, "*fp32")
        else:
            signature[parameter.name] = "fp32" if parameter.name in FLOATS else "i32"
        if parameter.name.endswith("_ptr") or parameter.name in ALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": config.warps})
    code = compiled.asm["llir"]
    return {
        "kernel": name,
        "arch": arch,
        "shared": compiled.metadata.shared,
        "libdevice": "__nv_" in code,
        "fp64": "double" in code,
    }


def main() -> None:
    for module in pkgutil.iter_modules(kernels.__path__, "kernels."):
        for name, function in vars(importlib.import_module(module.name)).items():
            if isinstance(function, JITFunction) and name.endswith("_kernel"):
                for arch in (80, 90):
                    print(json.dumps(compile_kernel(name.removesuffix("_kernel"), function, arch)), flush=True)


if __name__ == "__main__":
    main()
