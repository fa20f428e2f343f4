"""A training step of every family of models that the seeds train, full size, random weights: memory and tokens/s.

    model                 language model, tower                            trained besides the projector
    LaVIN-7B              LLaMA-7B, CLIP-L/14-224's class tokens           MMA adapters in both
    LLaVA-1.5-7B          Vicuna-7B v1.5 (LLaMA-2), CLIP-L/14-336          LoRA 128
    Bunny-Llama-3-8B      LLaMA-3-8B, SigLIP-384                           LoRA 128
    Bunny-Phi-1.5         Phi-1.5, EVA02-CLIP-L/14-336                     LoRA 128
    Bunny-Phi-2           Phi-2, SigLIP-384                                LoRA 128
    Imp-Phi-2             Phi-2, SigLIP-384                                LoRA 256
    Bunny-Phi-3-mini      Phi-3-mini-4k, SigLIP-384                        LoRA 128
    Bunny-StableLM-2-eva  StableLM-2-1.6B, EVA02-CLIP-L/14-336             LoRA 128
    Bunny-StableLM-2      StableLM-2-1.6B, SigLIP-384                      LoRA 128

The language model's linears are NF4, the rest is bf16. A step is one pack: forward, backward and AdamW's update, by the
engine, every layer keeping all that it needs and no weight unpacked for good, so that memory is what the model takes
and not what the card has. A pack of T tokens is two samples of an image each, its 6 to 729 tokens among theirs, or one
of text alone; of the text 70 % is supervised. A frozen tower runs in every step here, whose features a run would keep.

Operations are end_to_end's: 4 for each weight of the language model's products and token that needs it. LoRA, the
tower and the projector earn nothing. What the plan predicts of memory and tokens/s stands beside what was measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.end_to_end import held, planned
from benchmarks.engine_setting import Setting, configuration, settle
from benchmarks.peers import require_csrc
from benchmarks.problem import Case, Yardstick
from benchmarks.rows import Origin, Row
from benchmarks.session import new_row
from benchmarks.step import DTYPE, PROMPT_SHARE, random_model
from benchmarks.trainers import NibbleTrainer, Trainer, packs_of
from benchmarks.whole_steps import Entrant, measure_steps, release
from benchmarks.workload import FIRST_SLOT, FIRST_WORD, Workload
from engine.data.packing import form_of
from engine.data.padding import pad
from engine.data.planning import own_rows
from engine.data.sample import IGNORE, Sample
from engine.plan.memory_budget import resident_bytes
from kernels import unpacked
from models.adapters.lora import LoRAConfig
from models.language.decoder import DecoderConfig
from models.language.llama import LLAMA2_7B, LLAMA3_8B, LLAMA_7B
from models.language.phi import PHI_1_5, PHI_2
from models.language.phi3 import PHI3_MINI
from models.language.stablelm import STABLELM_2_1_6B
from models.linear import Linear
from models.projector import ProjectorConfig
from models.vision.clip import CLIP_L_14_224, CLIP_L_14_336
from models.vision.eva import EVA02_CLIP_L_336
from models.vision.siglip import SIGLIP_SO400M_384
from models.vision.tower import TowerConfig
from models.vlm import VisionLanguageModel, VLMConfig

POLICY = "save_all"
IMAGES = 2
ROUNDS, QUICK_ROUNDS = 7, 3


@dataclass(frozen=True, slots=True)
class Pair:
    """A language model and a tower."""

    language: DecoderConfig
    tower: TowerConfig
    lora: LoRAConfig | None = None  # None: MMA adapters in both, behind LaVIN's projector

    def model(self, *, is_tiny: bool) -> VLMConfig:
        """Its configuration; `is_tiny`: the family at a size that a CPU can do."""
        language, tower = (_tiny(self.language), _tiny_tower(self.tower)) if is_tiny else (self.language, self.tower)
        if self.lora is None:
            return VLMConfig(language=language, vision=tower)
        return VLMConfig(
            language=language, vision=tower, projector=ProjectorConfig(kind="mlp2x_gelu"), lora=self.lora,
            train_language="lora", train_vision="frozen",
        )  # fmt: skip


LORA = LoRAConfig(rank=128, alpha=256.0)  # LLaVA's and Bunny's
IMPS_LORA = LoRAConfig(rank=256, alpha=256.0)
PAIRS = {
    "LaVIN-7B": Pair(LLAMA_7B, CLIP_L_14_224),
    "LLaVA-1.5-7B": Pair(replace(LLAMA2_7B, rope_interleaved=False), CLIP_L_14_336, LORA),
    "Bunny-Llama-3-8B": Pair(replace(LLAMA3_8B, rope_interleaved=False), SIGLIP_SO400M_384, LORA),
    "Bunny-Phi-1.5": Pair(PHI_1_5, EVA02_CLIP_L_336, LORA),
    "Bunny-Phi-2": Pair(PHI_2, SIGLIP_SO400M_384, LORA),
    "Imp-Phi-2": Pair(PHI_2, SIGLIP_SO400M_384, IMPS_LORA),
    "Bunny-Phi-3-mini": Pair(PHI3_MINI, SIGLIP_SO400M_384, LORA),
    "Bunny-StableLM-2-eva": Pair(STABLELM_2_1_6B, EVA02_CLIP_L_336, LORA),
    "Bunny-StableLM-2": Pair(STABLELM_2_1_6B, SIGLIP_SO400M_384, LORA),
}


def _tiny(config: DecoderConfig) -> DecoderConfig:
    groups = 1 if config.num_kv_heads < config.num_heads else 2
    turning = None if config.rotary_dim is None else 16  # of 32
    return replace(
        config, vocab_size=96, dim=64, num_layers=2, num_heads=2, num_kv_heads=groups, ffn_dim=96, rotary_dim=turning
    )


def _tiny_tower(config: TowerConfig) -> TowerConfig:
    return replace(config, width=64, num_layers=6, num_heads=2, image_size=28, mlp_dim=96)


def cases() -> list[Case]:
    """With images and without, one after the other for each model, whose weights stay as long. --quick: with images."""
    return [
        Case(
            "families", {"model": name, "size": "full", "T": 2048, "images": images},
            modes=("step",), quick=images > 0,
        )
        for name in PAIRS
        for images in (IMAGES, 0)
    ]  # fmt: skip


def rows(case: Case, device: torch.device, origin: Origin, quick: bool) -> Iterator[Row]:
    """One row: ours."""
    dtype = DTYPE if device.type == "cuda" else torch.float32
    unpacked.release()  # copies of the case before this one
    release(device)
    is_tiny, tokens, images = case.shape["size"] == "tiny", case.shape["T"], case.shape["images"]
    config = PAIRS[case.shape["model"]].model(is_tiny=is_tiny)
    vlm = held(f"{case.shape['model']} {case.shape['size']}", lambda: random_model(config, device, dtype=dtype), device)
    work = samples(config, tokens, images)
    setting: list[Setting] = []

    def nibble() -> Trainer:
        require_csrc(vlm)
        there = resident_bytes(vlm, {})
        trainer = NibbleTrainer(vlm, tokens, device)
        longest = max(len(sample.input_ids) for sample in work.samples)
        setting.append(settle(configuration(POLICY, tokens, len(work.samples), longest, 0), vlm, POLICY, device))
        trainer.borrowed_bytes = there
        return trainer

    row = new_row(case, "nibble", str(dtype).removeprefix("torch."), origin, None)
    for _, steps in measure_steps([Entrant("nibble", nibble)], [work], device, QUICK_ROUNDS if quick else ROUNDS):
        if isinstance(steps, str):
            yield row(failure=steps)
            continue
        form = form_of(config)
        packs = [pad(pack, form.tile_tokens) for pack in packs_of(work, tokens, "sample", form)]
        own = planned(setting[0], vlm, packs, work.tokens, device)
        own["setting"] = "; ".join(filter(None, (own.get("setting"), steps.launched))) or None
        seconds = sum(steps.seconds) / len(steps.seconds)
        flops = useful_flops(vlm, work)
        yield row(
            "step", **steps.fields(), **own, flops=flops, tflops=flops / seconds / 1e12,
            fraction=flops / seconds / 1e12 / origin.matrix_tflops,
            samples_per_s=len(work.samples) / seconds, tokens_per_s=work.tokens / seconds,
        )  # fmt: skip
    release(device)


def samples(config: VLMConfig, tokens: int, images: int) -> Workload:
    """Samples of one length that fill a pack of so many tokens: one for each image with its tokens at the head, or a
    single one without an image."""
    own, count = own_rows(modality=config.has_modality_token), max(1, images)
    length, size, head = (tokens - own) // count, config.vision.image_size, FIRST_SLOT
    slots = list(range(head, head + config.tokens_per_tile)) if images else []
    generator = torch.Generator().manual_seed(0)
    made: list[Sample] = []
    tiles: list[Tensor | None] = []
    for i in range(count):
        ids = torch.randint(FIRST_WORD, config.language.vocab_size, (length,), generator=generator).tolist()
        for slot in slots:
            ids[slot] = 0
        prompt = head + len(slots) + round(PROMPT_SHARE * (length - head - len(slots)))
        name = f"{i}.png" if images else None
        made.append(Sample(str(i), ids, [IGNORE] * prompt + ids[prompt:], name, slots, False))
        tiles.append(torch.randn(3, size, size, generator=generator) if images else None)
    return Workload(made, tiles)


def useful_flops(vlm: VisionLanguageModel, work: Workload) -> int:
    """4N: forward and dX of each weight of the language model's products, for each token that needs it."""
    blocks = (part for block in vlm.language.blocks() for part in block.modules() if isinstance(part, Linear))
    in_blocks, head = sum(part.in_features * part.out_features for part in blocks), vlm.language.head
    return 4 * (in_blocks * work.tokens + head.in_features * head.out_features * work.supervised)


YARDSTICK = Yardstick("families", __doc__ or "", cases, lambda case: ("nibble",), rows, tiny={"size": "tiny", "T": 512})

if __name__ == "__main__":
    sys.exit(command.main(YARDSTICK, sys.argv[1:]))
