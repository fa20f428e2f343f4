"""Every language model against transformers' own, from the files that it writes: 20 random shapes a family, fp32."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.sample import IGNORE, Sample
from engine.generation import Sampling, generate
from models.pack import Pack, Segments
from models.projector import ProjectorConfig
from models.vlm import VisionLanguageModel, VLMConfig
from models.weights.language import open_language
from tests.models import shapes
from tests.models.drawn import CPU, filled
from tests.models.parity import hf_models
from tests.models.tiny import assert_close

LENGTHS = (7, 1, 12)  # of the sequences in a pack; the longest is longer than most windows
SEEDS, FEW_SEEDS = range(20), range(5)


@dataclass
class Pair:
    """A model of transformers, and ours from its files."""

    theirs: Any
    ours: VisionLanguageModel

    @classmethod
    def of(cls, theirs: Any, folder: Path, bits: int = 16) -> Pair:
        return cls(theirs, joint_model(hf_models.save(theirs, folder), bits))


def joint_model(folder: Path, bits: int = 16) -> VisionLanguageModel:
    """The language model in `folder`, frozen, beside a tower that has no part in this."""
    source = open_language(folder)
    config = VLMConfig(
        language=source.config, vision=shapes.tower("clip"), projector=ProjectorConfig(kind="linear"),
        train_language="frozen", train_vision="frozen", train_projector="frozen",
    )  # fmt: skip
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    filled(model.language, source.stream(), lambda name: 16 if name == "head.weight" else bits)
    return model.eval()


def segments_of(lengths: tuple[int, ...]) -> Segments:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return Segments(
        cu_seqlens=bounds.int(),
        max_seqlen=max(lengths),
        position_ids=torch.cat([torch.arange(n) for n in lengths]).int(),
        router_row=torch.zeros(sum(lengths), dtype=torch.int32),
    )


@dataclass
class States:
    """Of a pack: the stream that enters the first block and what leaves each, the last one normalised, [T, D] each;
    and logits [T, V]."""

    hidden: list[Tensor]
    logits: Tensor

    def named(self) -> list[tuple[str, Tensor]]:
        return [*((f"hidden state {i}", state) for i, state in enumerate(self.hidden)), ("logits", self.logits)]

    def assert_close_to(self, expected: States) -> None:
        for (name, got), (_, wanted) in zip(self.named(), expected.named(), strict=True):
            assert_close(got.detach(), wanted.detach(), name)


def run_ours(model: VisionLanguageModel, embeddings: Tensor) -> States:
    streams = [embeddings]
    hooks = [
        block.register_forward_hook(lambda _, inputs, outputs: streams.append(outputs[0] + outputs[1]))
        for block in model.language.blocks()
    ]
    x, delta = model.blocks(embeddings, segments_of(LENGTHS), None, None, None)
    for hook in hooks:
        hook.remove()
    stream = x if delta is None else x + delta
    assert torch.equal(stream, streams[-1])
    return States([*streams[:-1], model.language.norm(stream)], model.logits(stream))


def run_theirs(model: Any, embeddings: Tensor) -> States:
    outs = [model(inputs_embeds=part[None], output_hidden_states=True) for part in embeddings.split(LENGTHS)]
    states = zip(*(out.hidden_states for out in outs), strict=True)
    return States([torch.cat([s[0] for s in state]) for state in states], torch.cat([out.logits[0] for out in outs]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_hidden_states_logits_loss_and_input_gradients(family: str, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{family} {seed}")
    pair = Pair.of(hf_models.language_model(hf_models.FAMILIES[family](draw), seed), tmp_path)
    torch.manual_seed(seed)
    ids = torch.randint(3, pair.theirs.config.vocab_size, (sum(LENGTHS),))
    embedded = pair.ours.language.embed(ids).detach()
    assert torch.equal(embedded, pair.theirs.get_input_embeddings()(ids))
    weights = torch.rand(sum(LENGTHS)) / sum(LENGTHS)

    expected_inputs, inputs = (embedded.clone().requires_grad_() for _ in range(2))
    expected = run_theirs(pair.theirs, expected_inputs)
    run_ours(pair.ours, inputs).assert_close_to(expected)

    labels = torch.randint(0, pair.theirs.config.vocab_size, (sum(LENGTHS),))
    expected_loss = (weights * F.cross_entropy(expected.logits, labels, reduction="none")).sum()
    loss = pack_loss(pair.ours, inputs, labels, weights)
    assert_close(loss.detach()[None], expected_loss.detach()[None], "loss")
    expected_gradient = torch.autograd.grad(expected_loss, expected_inputs)[0]
    assert_close(torch.autograd.grad(loss, inputs)[0], expected_gradient, "gradient of the embeddings")


def pack_loss(model: VisionLanguageModel, embeddings: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The model's own loss of a pack whose embeddings are given."""
    tokens = embeddings.shape[0]
    pack = Pack(
        input_ids=torch.zeros(tokens, dtype=torch.int64), segments=segments_of(LENGTHS),
        modality_rows=torch.zeros(0, dtype=torch.int64), tiles=None, tile_router=torch.zeros(0, dtype=torch.int64),
        image_slots=torch.zeros(0, dtype=torch.int64), supervised=torch.arange(tokens), labels=labels, weights=weights,
        num_samples=len(LENGTHS),
    )  # fmt: skip
    model.embed = lambda pack, seed: embeddings  # type: ignore[method-assign]
    return model(pack)


@pytest.mark.parametrize("seed", FEW_SEEDS)
@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_greedy_generation_writes_the_same_64_tokens(family: str, seed: int, tmp_path: Path) -> None:
    """From a cache, prompts of several lengths together, against transformers one by one. Windows are shorter than the
    text; none of one token, of which transformers' cache keeps all."""
    config = hf_models.FAMILIES[family](random.Random(f"{family} greedy {seed}"))
    if family == "phi3":
        config.sliding_window = (None, 2, 4, 9, 40)[seed]
    pair = Pair.of(hf_models.language_model(config, seed), tmp_path)
    torch.manual_seed(seed)
    prompts = [torch.randint(3, pair.theirs.config.vocab_size, (n,)).tolist() for n in (5, 1, 9)]
    samples = [Sample(str(n), ids, [IGNORE] * len(ids), None, [], False) for n, ids in enumerate(prompts)]
    written = generate(
        pair.ours, samples, [None] * len(prompts), sampling=Sampling(max_new_tokens=64, temperature=0.0),
        generator=torch.Generator(), eos_id=-1, device=CPU,
    )  # fmt: skip
    for prompt, ours in zip(prompts, written, strict=True):
        theirs = pair.theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=64, min_new_tokens=64,
            do_sample=False, eos_token_id=None,
        )[0, len(prompt) :]  # fmt: skip
        assert ours == theirs.tolist()


@pytest.mark.parametrize("seed", FEW_SEEDS)
@pytest.mark.parametrize("family", hf_models.FAMILIES)
@torch.no_grad()
def test_four_bits_agree_with_bitsandbytes(family: str, seed: int, tmp_path: Path) -> None:
    """The same files, quantised there by bitsandbytes as transformers loads them, and here by our own rule."""
    config = hf_models.FAMILIES[family](random.Random(f"{family} nf4 {seed}"), hf_models.WHOLE_BLOCKS)
    exact = hf_models.language_model(config, seed)
    folder = hf_models.save(exact, tmp_path)
    theirs = hf_models.load_in_four_bits(hf_models.transformers.AutoModelForCausalLM, folder)
    ours = joint_model(folder, bits=4)
    embeddings = ours.language.embed(torch.arange(3, 3 + sum(LENGTHS)) % config.vocab_size)
    got = run_ours(ours, embeddings)
    got.assert_close_to(run_theirs(theirs, embeddings))
    off = (got.hidden[-1] - run_theirs(exact, embeddings).hidden[-1]).abs().max()
    assert off > 1e-2, "four bits are another model"
