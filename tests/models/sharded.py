"""Two gloo ranks that take two steps of a small packed model, each way of running it: what test_sharded.py starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kernels.dequantize_nf4 import dequantize_nf4
from kernels.nf4 import NF4Tensor
from models.linear import Linear
from models.pack import Pack
from models.vlm import VisionLanguageModel
from tests.models.tiny import LAYOUT, packed_copy, packs_of, random_samples, tiny_config, tiny_model

CPU = torch.device("cpu")
WORLD = 2
STEPS = 2
LR = 0.05
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
Result = dict[str, Tensor]


def model_of(*, checkpointing: bool = False) -> VisionLanguageModel:
    """The language model in NF4 (rows and blocks do not line up), its head and the tower in int8, adapters trained."""
    source = tiny_model(tiny_config(ffn_dim=37, dropout=0.0))

    def bits(part: str, name: str) -> int:
        return 4 if part == "language" and name.startswith("layers.") else 8

    return packed_copy(source, bits, checkpointing=checkpointing)


def packs() -> list[Pack]:
    """One for each rank, with a picture each: together the samples of a step."""
    samples, tiles = random_samples(LAYOUT[:6])
    return [pack for _, pack in packs_of(samples, tiles, plan=[[0, 1, 2], [3, 4, 5]])]


def steps(model: nn.Module, share: list[Pack], average: float, total: Callable[[Tensor], Tensor]) -> Result:
    """Two steps of plain SGD; loss and gradients of each, gradients as sums over ranks. `average`: what turns the
    gradients that ranks agree on, a mean, into that sum."""
    found: Result = {}
    trained = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
    for step in range(STEPS):
        losses = []
        for pack in share:
            loss = model(pack)
            loss.backward()
            losses.append(loss.detach())
        found[f"{step}/loss"] = total(torch.stack(losses).sum())
        for name, parameter in trained.items():
            assert parameter.grad is not None, name
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            found[f"{step}/{name}"] = grad * average
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=LR * average)
            parameter.grad = None
    return found


def one_process(*, checkpointing: bool = False) -> Result:
    return steps(model_of(checkpointing=checkpointing), packs(), 1.0, lambda loss: loss)


def sharded(model: VisionLanguageModel, policy: MixedPrecisionPolicy | None = None) -> VisionLanguageModel:
    """Every layer a unit of its own, gathered for its forward and again for its backward."""
    options = {} if policy is None else {"mp_policy": policy}
    for block in (*model.language.blocks(), *model.vision.blocks()):
        fully_shard(block, reshard_after_forward=True, **options)
    fully_shard(model, **options)
    return model


def weights(block: nn.Module) -> Result:
    """The layer's packed weights, unpacked."""
    linears = {name: module for name, module in block.named_modules() if isinstance(module, Linear)}
    packed = {name: linear.frozen_weight() for name, linear in linears.items()}
    return {name: dequantize_nf4(q) for name, q in packed.items() if isinstance(q, NF4Tensor)}


def _gathered(block: nn.Module) -> Result:
    assert isinstance(block, FSDPModule)
    block.unshard()
    return weights(block)


def _summed(loss: Tensor) -> Tensor:
    dist.all_reduce(loss)
    return loss


def main(folder: Path, rank: int) -> None:
    """Rank `rank` of two; the first one writes what it found, a file for each way."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    share = [packs()[rank]]
    ways: dict[str, nn.Module] = {
        "ddp": DistributedDataParallel(model_of()),
        "fsdp": sharded(model_of()),
        "fsdp-checkpointing": sharded(model_of(checkpointing=True)),
    }
    found = {way: steps(model, share, WORLD, _summed) for way, model in ways.items()}
    block = ways["fsdp"].get_submodule("language.layers.1")
    assert all(isinstance(p, DTensor) for p in block.parameters()), "a layer was left gathered"
    found["fsdp-bf16-weights"] = _gathered(sharded(model_of(), BF16).language.layers[1])
    for way, result in found.items():
        if rank == 0:
            save_file(result, folder / f"{way}.safetensors")
    dist.destroy_process_group()
    # FSDP keeps the group alive, so gloo's own threads may be letting go of a gathered tensor, and a thread that asks
    # for the GIL of an interpreter that is ending aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
