"""AdamW on the trainable tensors of LaVIN-7B and 13B: unscale, clip to a global norm, update (goal G12).

Ours works on one flat buffer and zeroes the gradient too. torch is what a training loop has: GradScaler.unscale_,
clip_grad_norm_ and fused AdamW over the model's list of tensors; torch_flat is the same over one flat tensor. Both
leave the gradient as it is. Least bytes: fp32 parameter, gradient and two moments, read and written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import command
from benchmarks.problem import Bench, Case, Cost, Inputs, Problem, Variant, normal
from engine.optim import decays
from kernels.adamw import adamw
from models.language.llama import LLAMA_7B, LLAMA_13B
from models.vision.clip import ClipConfig
from models.vlm import VisionLanguageModel, VLMConfig

LR, BETA1, BETA2, EPS, DECAY, MAX_NORM = 1e-2, 0.9, 0.95, 1e-8, 0.02, 1.0
STEPS, SCALE = 10.0, 65536.0
MODELS = {"7B": LLAMA_7B, "13B": LLAMA_13B}


def cases() -> list[Case]:
    sizes = {"7B": 3_781_296, "13B": 5_390_080}
    return [Case("adamw", {"model": f"LaVIN-{name}", "N": count}, modes=("step",)) for name, count in sizes.items()]


def problem(case: Case, device: torch.device) -> Problem:
    count = case.shape["N"]
    shapes, decayed = trainable_shapes(case.shape["model"].removeprefix("LaVIN-"))
    assert sum(shape.numel() for shape in shapes) == count

    def draw(generator: torch.Generator) -> Inputs:
        def fp32(scale: float = 1.0) -> Tensor:
            return normal(generator, count, dtype=torch.float32, scale=scale)

        scalars = {"step": STEPS, "lr": LR, "inv_scale": 1.0 / SCALE}
        return {
            "param": fp32(), "grad": fp32(SCALE), "exp_avg": fp32(1e-3), "exp_avg_sq": fp32(1e-3).square_(),
            **{name: torch.tensor([value], device=device) for name, value in scalars.items()},
        }  # fmt: skip

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        norm = adamw(
            *(inputs[name] for name in ("param", "grad", "exp_avg", "exp_avg_sq", "step", "lr", "inv_scale")),
            decayed=decayed, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY, max_norm=MAX_NORM,
        )  # fmt: skip
        return *_state(inputs), norm

    return Problem(
        draw=draw,
        differentiable=(),
        reference=lambda inputs: _reference(inputs, decayed),
        variants=(
            Variant("nibble", lambda: nibble),
            Variant("torch", lambda: _torch_step, prepare=lambda inputs: _optimizer(inputs, shapes, decayed)),
            Variant(
                "torch_flat",
                lambda: _torch_step,
                prepare=lambda inputs: _optimizer(
                    inputs, [torch.Size([decayed]), torch.Size([count - decayed])], decayed
                ),
            ),
        ),
        cost={"step": Cost(bytes=32 * count)},
        dtype=torch.float32,
        tolerance=1e-3,  # of the norm: a sum of five million squares in fp32
    )


def trainable_shapes(model: str) -> tuple[list[torch.Size], int]:
    """Shapes of LaVIN's trainable tensors, those with weight decay first, and how many elements these have."""
    with torch.device("meta"):
        vlm = VisionLanguageModel(VLMConfig(language=MODELS[model], vision=ClipConfig()))
    with_decay = [p.shape for name, p in vlm.trainable().items() if decays(name, p)]
    without = [p.shape for name, p in vlm.trainable().items() if not decays(name, p)]
    return with_decay + without, sum(shape.numel() for shape in with_decay)


def _state(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["param"], inputs["exp_avg"], inputs["exp_avg_sq"]


def _reference(inputs: Inputs, decayed: int) -> tuple[Tensor, ...]:
    """torch.optim.AdamW's formula in fp64, out of place."""
    param, grad, exp_avg, exp_avg_sq = (inputs[n].double() for n in ("param", "grad", "exp_avg", "exp_avg_sq"))
    grad = grad / SCALE
    norm = grad.norm()
    grad = grad * (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
    exp_avg = BETA1 * exp_avg + (1 - BETA1) * grad
    exp_avg_sq = BETA2 * exp_avg_sq + (1 - BETA2) * grad.square()
    shrink = torch.ones_like(param)
    shrink[:decayed] -= LR * DECAY
    step = STEPS + 1.0
    update = exp_avg / (1 - BETA1**step) / ((exp_avg_sq / (1 - BETA2**step)).sqrt() + EPS)
    return param * shrink - LR * update, exp_avg, exp_avg_sq, norm


def _optimizer(inputs: Inputs, shapes: list[torch.Size], decayed: int) -> Inputs:
    """torch's AdamW whose parameters, gradients and moments are views of the flat buffers, and a GradScaler."""
    device = inputs["param"].device

    def views(name: str) -> Iterator[Tensor]:
        parts = inputs[name].split([shape.numel() for shape in shapes])
        return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))

    parameters = [nn.Parameter(view) for view in views("param")]
    seen, groups = 0, ([], [])  # type: tuple[int, tuple[list[nn.Parameter], list[nn.Parameter]]]
    for parameter, grad in zip(parameters, views("grad"), strict=True):
        parameter.grad = grad
        groups[seen >= decayed].append(parameter)
        seen += parameter.numel()
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": DECAY}, {"params": groups[1], "weight_decay": 0.0}],
        lr=LR, betas=(BETA1, BETA2), eps=EPS, fused=on_cuda, capturable=on_cuda,
    )  # fmt: skip
    for parameter, exp_avg, exp_avg_sq in zip(parameters, views("exp_avg"), views("exp_avg_sq"), strict=True):
        step = torch.tensor(STEPS, device=device)
        optimizer.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
    scaler.scale(torch.zeros((), device=device))  # makes the scale a tensor, as the first loss does
    return inputs | {"parameters": parameters, "optimizer": optimizer, "scaler": scaler}


def _torch_step(inputs: Inputs) -> tuple[Tensor, ...]:
    optimizer: Any = inputs["optimizer"]
    scaler: Any = inputs["scaler"]
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(inputs["parameters"], MAX_NORM)
    scaler.step(optimizer)
    scaler.update()
    return *_state(inputs), norm


BENCH = Bench("adamw", __doc__ or "", cases, problem, tiny={})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
