"""Joint models of every family: what learns and how it starts, where images go, packs, and decoding by the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.data.packing import collate, form_of, token_weights
from engine.data.sample import IGNORE, NEWLINE, Sample
from engine.generation import Sampling, generate
from models.adapters.lora import LoRAConfig
from models.adapters.mma import AdapterConfig
from models.pack import Pack
from models.projector import ProjectorConfig
from models.vlm import VisionLanguageModel, VLMConfig
from tests.models import shapes
from tests.models.drawn import CPU
from tests.models.shapes import DIM, SIDE, VOCAB, WIDTH
from tests.models.tiny import assert_close, assert_gradients_close, gradients, tiny_model

LANGUAGE = {
    "llama": shapes.language("llama-3"), "phi": shapes.language("phi"), "phi3": shapes.language("phi3", window=7),
    "stablelm": shapes.language("stablelm"),
}  # fmt: skip
VISION = {
    "clip": shapes.tower("clip", select_feature="cls_patch"),
    "eva": shapes.tower("eva"),
    "siglip": shapes.tower("siglip"),
}
PAIRS = list(zip(LANGUAGE, [*VISION, "siglip"], strict=True))
LAYOUT = [(9, False), (31, True), (4, False), (24, True)]


def config_of(language: str, vision: str, **options: Any) -> VLMConfig:
    return VLMConfig(
        language=LANGUAGE[language], vision=VISION[vision], projector=ProjectorConfig(kind="mlp2x_gelu"),
        adapter=AdapterConfig(dim=8, temperature=2.0), lora=LoRAConfig(rank=4, alpha=8.0), **options,
    )  # fmt: skip


def samples_of(config: VLMConfig, layout: Sequence[tuple[int, bool]] = LAYOUT) -> tuple[list[Sample], list[Any]]:
    """One for each (length beside the image, has an image); the last half of each is targets."""
    generator = torch.Generator().manual_seed(0)
    samples, tiles = [], list[Tensor | None]()
    for number, (length, has_image) in enumerate(layout):
        slots = list(range(2, 2 + config.tokens_per_tile)) if has_image else []
        ids = torch.randint(1, VOCAB, (length + len(slots),), generator=generator).tolist()
        for slot in slots:
            ids[slot] = 0
        labels = [IGNORE] * (len(ids) - length // 2) + ids[len(ids) - length // 2 :]
        samples.append(Sample(str(number), ids, labels, image=None, image_slots=slots, truncated=False))
        tiles.append(torch.randn(3, SIDE, SIDE, generator=generator) if has_image else None)
    return samples, tiles


def pack_of(config: VLMConfig, members: Sequence[int] = range(len(LAYOUT))) -> Pack:
    samples, tiles = samples_of(config)
    weights = token_weights(samples, "token")
    return collate(
        [samples[i] for i in members], [weights[i] for i in members], [tiles[i] for i in members], form=form_of(config)
    )


def parts_of(model: VisionLanguageModel) -> set[str]:
    """What learns: the part, or the last two names of an adapter's tensor."""
    return {".".join(name.split(".")[-2:]) if ".lora." in name else name.split(".", 1)[0] for name in model.trainable()}


@pytest.mark.parametrize(("language", "vision"), PAIRS)
def test_what_learns(language: str, vision: str) -> None:
    lora = config_of(language, vision, train_language="lora", train_vision="frozen", image_newline=True)
    with torch.device("meta"):
        model = VisionLanguageModel(lora)
        assert parts_of(model) == {"lora.a", "lora.b", "projector", "image_newline"}
        assert not any(".lora." in name for name, _ in model.vision.named_parameters())
        assert model.language.head.lora is None
        both = VisionLanguageModel(replace(lora, train_vision="lora", train_projector="frozen"))
        assert parts_of(both) == {"lora.a", "lora.b"}
        assert any(".lora." in name for name in both.vision.state_dict())
        full = VisionLanguageModel(replace(lora, train_language="full", train_vision="full"))
        assert set(full.trainable()) == {name for name, _ in full.named_parameters()}
        frozen = VisionLanguageModel(replace(lora, train_language="frozen", image_newline=False))
        assert parts_of(frozen) == {"projector"}
        mma = VisionLanguageModel(config_of(language, vision))
        assert parts_of(mma) == {"modality_embedding", "language", "vision", "projector"}
        assert all("_adapter." in name for name in mma.trainable() if name.startswith(("language.", "vision.")))


def test_lora_goes_where_it_is_asked_for() -> None:
    config = config_of("phi3", "siglip", train_language="lora", train_vision="frozen")
    with torch.device("meta"):
        model = VisionLanguageModel(replace(config, lora=LoRAConfig(rank=2, targets=("attention.qkv", "mlp.down"))))
        found = {name.split(".", 3)[3].rpartition(".lora.")[0] for name in model.trainable() if ".lora." in name}
        assert found == {"attention.qkv", "mlp.down"}
        with pytest.raises(ValueError, match=r"attention\.q\b.*attention\.qkv"):
            VisionLanguageModel(replace(config, lora=LoRAConfig(targets=("attention.q",))))


def test_lora_starts_as_nothing_and_the_same_for_one_seed() -> None:
    config = config_of("phi", "siglip", train_language="lora", train_vision="frozen", image_newline=True)
    base = tiny_model(replace(config, train_language="frozen"))
    model = tiny_model(config)
    model.load_state_dict(base.state_dict(), strict=False)
    model.start_trainable(3, CPU)
    model.projector.load_state_dict(base.projector.state_dict())
    pack = pack_of(config)
    with torch.no_grad():
        assert torch.equal(model(pack), base(pack))
    a = model.language.blocks()[0].attention.q.lora
    assert a is not None and not a.b.any() and 0 < a.a.abs().max() <= DIM**-0.5
    assert model.image_newline is not None and 0.3 < model.image_newline.std() * DIM**0.5 < 2
    again = tiny_model(config)
    again.start_trainable(3, CPU)
    other = tiny_model(config)
    other.start_trainable(4, CPU)
    torch.manual_seed(0)
    for name in ("language.layers.1.mlp.up.lora.a", "image_newline"):
        assert torch.equal(model.get_parameter(name), again.get_parameter(name))
        assert not torch.equal(model.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize("trained", ["lora", "mma", "full"])
@pytest.mark.parametrize(("language", "vision"), PAIRS)
def test_a_pack_is_its_samples_one_by_one(language: str, vision: str, trained: str) -> None:
    config = config_of(language, vision, train_language=trained, train_vision=trained)
    model = tiny_model(config).double()
    pack = pack_of(config)
    assert pack.modality_rows.numel() == (2 if trained == "mma" else 0)
    first = pack.segments.cu_seqlens[pack.modality_rows.numel()]
    assert pack.segments.position_ids[first] == (1 if trained == "mma" else 0)
    weights = dict(model.named_parameters())
    loss = model(pack)
    alone = torch.stack([model(pack_of(config, [i])) for i in range(len(LAYOUT))]).sum()
    assert_close(loss, alone, "loss", tolerance=1e-10)
    found, expected = gradients(loss, weights), gradients(alone, weights)
    assert_gradients_close(found, expected, tolerance=1e-8, floor=1e-14)
    silent = {name for name, gradient in expected.items() if gradient.abs().max() < 1e-12}
    assert all(name.startswith("vision.") and name.endswith("k.bias") for name in silent), "a path is switched off"


@pytest.mark.parametrize("trained", ["lora", "mma", "frozen"])
@pytest.mark.parametrize(("language", "vision"), PAIRS)
def test_the_cache_writes_what_whole_passes_write(language: str, vision: str, trained: str) -> None:
    config = config_of(language, vision, train_language=trained, train_vision="frozen")
    model = tiny_model(config, seed=1).double()
    for bias in (model.language.head.bias, model.language.norm.bias):
        if bias is not None:
            bias.data *= 0.1  # or they alone choose every token
    samples, tiles = samples_of(config)
    for sample in samples:
        sample.labels = [IGNORE] * len(sample.labels)
    written = generate(
        model, samples, tiles, sampling=Sampling(max_new_tokens=8, temperature=0.0),
        generator=torch.Generator(), eos_id=-1, device=CPU,
    )  # fmt: skip
    assert len({tuple(text) for text in written}) > 1
    for sample, tile, text in zip(samples, tiles, written, strict=True):
        longer = replace(sample, input_ids=sample.input_ids + text, labels=[IGNORE] * (len(sample.input_ids) + 8))
        pack = collate([longer], [torch.zeros(len(longer.labels))], [tile], form=form_of(config))
        start = pack.modality_rows.numel() + len(sample.input_ids) - 1
        with torch.no_grad():
            logits = model.logits(model.hidden(pack)[start : start + 8])
        assert logits.argmax(-1).tolist() == text


def test_image_rows_say_which_embedding_stands_where() -> None:
    config = config_of("phi", "siglip", train_language="lora", train_vision="frozen", image_newline=True)
    model = tiny_model(config).double()
    per_tile = config.tokens_per_tile
    rows = [3, 0, NEWLINE, per_tile + 1, 3, NEWLINE]  # of two tiles
    ids = [5, 6, *[0] * len(rows), 7, 8, 9]
    sample = Sample("a", ids, [IGNORE] * 9 + ids[9:], None, list(range(2, 8)), False, num_tiles=2, image_rows=rows)
    plain, tile = samples_of(config, [(6, True)])
    two = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    both = [*plain, sample]  # the second's tiles come behind the first's one
    pack = collate(both, token_weights(both, "token"), [*tile, two], form=form_of(config))
    first = torch.stack([tile[0], *two])
    embeddings = model.projector(model.vision(first, None, None)).flatten(0, 1)
    newline = model.image_newline
    assert newline is not None
    wanted = [*embeddings[:per_tile], *(newline if r == NEWLINE else embeddings[per_tile + r] for r in rows)]
    x = model.embed(pack, None)
    assert torch.equal(x[pack.image_slots], torch.stack(wanted))
    (gradient,) = torch.autograd.grad(x[pack.image_slots].sum(), newline)
    assert torch.equal(gradient, torch.full_like(newline, 2.0))


def test_a_pack_of_texts_reaches_what_learns() -> None:
    config = config_of("stablelm", "clip", train_language="frozen", train_vision="frozen", image_newline=True)
    model = tiny_model(config)
    model(pack_of(config, [0, 2])).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.trainable().values())


def test_dropout_follows_the_seed_alone() -> None:
    """Residual dropout, LoRA's and drop path, all at once."""
    config = config_of("phi", "siglip", train_language="lora", train_vision="lora", drop_path=0.2)
    config = replace(config, lora=replace(config.lora, dropout=0.3))
    model, pack = tiny_model(config).train(), pack_of(config)
    losses = [model(pack, None if seed is None else torch.tensor([seed])).item() for seed in (None, 1, 1, 2)]
    assert losses[1] == losses[2] and len(set(losses)) == 3


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp4x_gelu"])
def test_a_projector_is_its_formula(kind: str) -> None:
    config = config_of("llama", "clip", train_language="frozen", train_vision="full")
    config = replace(config, projector=ProjectorConfig(kind=kind))
    projector = tiny_model(config).double().projector
    depth = 1 if kind == "linear" else int(kind[3])
    layers = [nn.Linear(WIDTH if i == 0 else DIM, DIM).double() for i in range(depth)]
    for i, layer in enumerate(layers):
        layer.load_state_dict({leaf: projector.get_parameter(f"layers.{i}.{leaf}") for leaf in ("weight", "bias")})
    plain = nn.Sequential(*[part for layer in layers for part in (nn.GELU(), layer)][1:])
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    got, expected = projector(x), plain(x)
    assert got.shape == (2, 5, DIM) and projector.tokens(5) == 5
    assert_close(got, expected, kind, tolerance=1e-12)
    ours = torch.autograd.grad(got.square().sum(), [x, *projector.parameters()])
    theirs = torch.autograd.grad(expected.square().sum(), [x, *plain.parameters()])
    for gradient, wanted in zip(ours, theirs, strict=True):
        assert_close(gradient, wanted, f"gradient of {kind}", tolerance=1e-9)


def test_projectors_that_are_none() -> None:
    with pytest.raises(ValueError, match="unknown projector 'mlp0x_gelu'"):
        ProjectorConfig(kind="mlp0x_gelu")
    with torch.device("meta"), pytest.raises(ValueError, match=r"width 24 .* width 32"):
        VisionLanguageModel(replace(config_of("phi", "eva"), projector=ProjectorConfig(kind="identity")))
