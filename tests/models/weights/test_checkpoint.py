"""One tiny model in every layout in which checkpoints come; each must open as the same parts, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.weights.checkpoint import Checkpoint, open_checkpoint
from models.weights.errors import WeightsError
from models.weights.language import open_language

transformers = pytest.importorskip("transformers")

Tensors = dict[str, Tensor]
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 16,
}  # fmt: skip
TEXT = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 24, "rms_norm_eps": 1e-5,
}  # fmt: skip
SAID = {
    "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu", "vision_config": VISION,
    "image_grid_pinpoints": [[336, 672], [672, 336]],
}  # fmt: skip
LLAVA = (  # (transformers' prefix, LLaVA's)
    ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."), ("image_newline", "model.image_newline"),
    ("vision_tower.", "model.vision_tower.vision_tower."),
)  # fmt: skip
MODERN = (  # from 4.52 on
    ("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector."), ("image_newline", "model.image_newline"),
    ("vision_tower.", "model.vision_tower."),
)  # fmt: skip


@pytest.fixture(scope="module")
def classic() -> tuple[Tensors, dict[str, Any]]:
    """A LlavaNext that transformers made, in the layout of llava-hf's repositories, and its config.json."""
    torch.manual_seed(0)
    config = transformers.LlavaNextConfig(
        vision_config=VISION, text_config=TEXT, image_token_index=20, image_grid_pinpoints=[[672, 336], [336, 672]]
    )
    model = transformers.LlavaNextForConditionalGeneration(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = next(old for old, new in MODERN if name.startswith(new))
        new = dict(MODERN)[old]
        theirs = old + name.removeprefix(new)
        if theirs.startswith("vision_tower.") and "vision_model." not in theirs:
            theirs = theirs.replace("vision_tower.", "vision_tower.vision_model.", 1)  # transformers 5 leaves it out
        tensors[theirs] = torch.randn(tensor.shape)
    return tensors, config.to_dict()


def renamed(tensors: Tensors, prefixes: tuple[tuple[str, str], ...]) -> Tensors:
    out = {}
    for name, tensor in tensors.items():
        old, new = next(pair for pair in prefixes if name.startswith(pair[0]))
        out[new + name.removeprefix(old)] = tensor
    return out


def write(folder: Path, tensors: Tensors, settings: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def contents(checkpoint: Checkpoint) -> Tensors:
    """Every tensor of every part under one name."""
    out: Tensors = {}
    for part, source in (("language", checkpoint.language), ("vision", checkpoint.vision)):
        for name, tensor in () if source is None else source.stream():
            assert isinstance(tensor, Tensor)
            out[f"{part}.{name}"] = tensor.clone()
    out |= {f"projector.{name}": tensor for name, tensor in (checkpoint.projector or {}).items()}
    return out if checkpoint.image_newline is None else out | {"image_newline": checkpoint.image_newline}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def expected(tmp_path: Path, classic: tuple[Tensors, dict[str, Any]]) -> Tensors:
    """The parts of `classic`: its whole content but what the tower does not run."""
    tensors, settings = classic
    found = contents(open_checkpoint(write(tmp_path / "classic", tensors, settings)))
    behind = [name for name in tensors if "vision_model.encoder.layers.2." in name or "post_layernorm" in name]
    assert len(found) + len(behind) == len(tensors)
    held = [tensor for name, tensor in tensors.items() if name not in behind]
    assert all(any(t.shape == h.shape and torch.equal(t, h) for h in held) for t in found.values())
    return found


def test_a_folder_of_transformers(tmp_path: Path, classic: tuple[Tensors, dict[str, Any]]) -> None:
    checkpoint = open_checkpoint(write(tmp_path, *classic))
    assert checkpoint.kind == "vlm" and checkpoint.lora is None
    assert checkpoint.language is not None and checkpoint.vision is not None and checkpoint.projector is not None
    assert checkpoint.settings is not None
    assert checkpoint.settings.grid_pinpoints == ((336, 672), (672, 336))
    assert checkpoint.language.config.num_kv_heads == 2
    assert checkpoint.vision.config.select_layer == -2 and checkpoint.vision.config.layers_run == 2
    tensors = classic[0]
    for ours, theirs in (
        (checkpoint.language.fetch("layers.1.attention.q.weight"),
         "language_model.model.layers.1.self_attn.q_proj.weight"),
        (checkpoint.language.fetch("head.weight"), "language_model.lm_head.weight"),
        (checkpoint.projector["layers.1.bias"], "multi_modal_projector.linear_2.bias"),
        (checkpoint.image_newline, "image_newline"),
        (checkpoint.vision.fetch("layers.1.mlp.up.bias"), "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"),
    ):  # fmt: skip
        assert isinstance(ours, Tensor) and torch.equal(ours, tensors[theirs]), theirs


@pytest.mark.parametrize("form", ["llava", "modern", "modern without vision_model", "as transformers saves it"])
def test_every_layout_opens_as_the_same_parts(
    tmp_path: Path, classic: tuple[Tensors, dict[str, Any]], expected: Tensors, form: str
) -> None:
    tensors, settings = classic
    if form == "llava":
        tensors, settings = renamed(tensors, LLAVA), TEXT | SAID
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    elif form == "as transformers saves it":
        model = transformers.LlavaNextForConditionalGeneration.from_pretrained(write(tmp_path / "a", tensors, settings))
        model.save_pretrained(tmp_path / "b")
        assert_same(contents(open_checkpoint(tmp_path / "b")), expected)
        return
    else:
        tensors = renamed(tensors, MODERN)
    if "without" in form:
        tensors = {name.replace("vision_model.", ""): tensor for name, tensor in tensors.items()}
    checkpoint = open_checkpoint(write(tmp_path / "named-lora-by-chance", tensors, settings))
    assert_same(contents(checkpoint), expected)
    assert checkpoint.settings is not None
    assert checkpoint.settings.grid_pinpoints == ((336, 672), (672, 336))


def test_a_tower_that_is_not_in_the_checkpoint(tmp_path: Path, classic: tuple[Tensors, dict[str, Any]]) -> None:
    tensors = {n: t for n, t in renamed(classic[0], LLAVA).items() if "vision_tower" not in n}
    checkpoint = open_checkpoint(write(tmp_path, tensors, TEXT | SAID))
    assert checkpoint.kind == "vlm" and checkpoint.vision is None
    assert checkpoint.settings is not None and checkpoint.settings.tower == "openai/clip-vit-large-patch14-336"


def test_the_language_part_alone_opens_too(
    tmp_path: Path, classic: tuple[Tensors, dict[str, Any]], expected: Tensors
) -> None:
    for name, tensor in open_language(write(tmp_path, *classic)).stream():
        assert isinstance(tensor, Tensor) and torch.equal(tensor, expected[f"language.{name}"]), name


def test_what_transformers_leaves_out_of_text_config_is_a_llama_of_7b(
    tmp_path: Path, classic: tuple[Tensors, dict[str, Any]]
) -> None:
    """As in llava-hf's files: the shapes then say that this is none, tensor by tensor."""
    tensors, settings = classic
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(write(tmp_path, tensors, settings | {"text_config": {"vocab_size": 24}}))
    assert "language_model.model.norm.weight: got 32, expected 4096" in caught.value.mismatched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if "newline" not in n}, "image_newline"),
        (lambda t: {n: v for n, v in t.items() if "mm_projector.2.bias" not in n}, "mm_projector|no kind"),
        (lambda t: {n: v for n, v in t.items() if "mm_projector" not in n}, "kind mlp2x_gelu, and none is among"),
        (
            lambda t: t | {"model.mm_projector.0.weight": torch.ones(32, 31)},
            "model.mm_projector.0.weight: got (32, 31)",
        ),
        (
            lambda t: (
                t | {"model.mm_projector.2.weight": torch.ones(31, 32), "model.mm_projector.2.bias": torch.ones(31)}
            ),
            "ends in a width of 31, and the language model has 32",
        ),
        (lambda t: t | {"model.image_newline": torch.ones(31)}, "image_newline: got 31, expected 32"),
        (lambda t: t | {"lm_head.weight": torch.ones(25, 32)}, "lm_head.weight: got 25x32, expected 24x32"),
        (lambda t: t | {"model.vision_resampler.weight": torch.ones(2)}, "vision_resampler"),
        (lambda t: t | {"language_model.model.norm.weight": torch.ones(32)}, "are both"),
        (
            lambda t: {n: v for n, v in t.items() if "layers.1.mlp.fc1.bias" not in n},
            "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias",
        ),
    ],
    ids=[
        "newline",
        "half a projector",
        "no projector",
        "tower and projector",
        "projector and language model",
        "width of newline",
        "vocabulary",
        "extra",
        "two layouts",
        "half a tower",
    ],
)
def test_nothing_is_opened_half(
    tmp_path: Path, classic: tuple[Tensors, dict[str, Any]], change: Callable[[Tensors], Tensors], message: str
) -> None:
    tensors = change(renamed(classic[0], LLAVA))
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(write(tmp_path, tensors, TEXT | SAID))
    error = caught.value
    assert any(part in str(error) for part in message.split("|"))


def test_a_config_that_forgot_the_tower(tmp_path: Path, classic: tuple[Tensors, dict[str, Any]]) -> None:
    with pytest.raises(WeightsError, match="says nothing of a tower") as caught:
        open_checkpoint(write(tmp_path, renamed(classic[0], LLAVA), TEXT))
    assert "model.mm_projector.0.weight" in caught.value.extra and caught.value.do


@pytest.mark.parametrize("form", ["llava", "classic", "modern"])
@pytest.mark.parametrize("part", ["tower", "projector"])
def test_a_model_without_a_part_that_it_is_said_to_hold(
    tmp_path: Path, classic: tuple[Tensors, dict[str, Any]], form: str, part: str
) -> None:
    """transformers' files always hold tower and projector, LLaVA's the tower where it was trained."""
    tensors, settings = classic
    if form == "llava":
        tensors, settings = renamed(tensors, LLAVA), TEXT | SAID | {"unfreeze_mm_vision_tower": True}
    elif form == "modern":
        tensors = renamed(tensors, MODERN)
    held = {name: tensor for name, tensor in tensors.items() if f"_{part}" not in name}
    assert 0 < len(held) < len(tensors)
    with pytest.raises(WeightsError, match=r"none is among (its|the) tensors"):
        open_checkpoint(write(tmp_path, held, settings))


@pytest.mark.parametrize(
    ("form", "missing"),
    [("classic", "language_model.model.layers.1.mlp.up_proj.weight"),
     ("modern", "model.language_model.layers.1.mlp.up_proj.weight")],
)  # fmt: skip
def test_what_is_missing_is_named_as_in_the_file(
    tmp_path: Path, classic: tuple[Tensors, dict[str, Any]], form: str, missing: str
) -> None:
    tensors, settings = classic
    tensors = dict(tensors) if form == "classic" else renamed(tensors, MODERN)
    del tensors[missing]
    write(tmp_path, tensors | {missing + "s": torch.ones(2)}, settings)
    for open_it in (open_checkpoint, open_language):
        with pytest.raises(WeightsError) as caught:
            open_it(tmp_path)
        assert (caught.value.missing, caught.value.extra) == ([missing], [missing + "s"])


@pytest.mark.parametrize("where", ["whole", "part"])
def test_a_head_that_is_the_embedding(
    tmp_path: Path, classic: tuple[Tensors, dict[str, Any]], expected: Tensors, where: str
) -> None:
    """tie_word_embeddings of the whole config.json or of its text_config; without it a head is missing."""
    tensors = {name: tensor for name, tensor in classic[0].items() if "lm_head" not in name}
    said = {"tie_word_embeddings": True}
    tied = classic[1] | (said if where == "whole" else {"text_config": classic[1]["text_config"] | said})
    found = contents(open_checkpoint(write(tmp_path, tensors, tied)))
    assert_same(found, expected | {"language.head.weight": expected["language.embed.weight"]})
    untied = {"tie_word_embeddings": False, "text_config": classic[1]["text_config"] | {"tie_word_embeddings": False}}
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(write(tmp_path, tensors, classic[1] | untied))
    assert len(caught.value.missing) == 1 and "lm_head.weight" in caught.value.missing[0]


def test_another_way_of_quantizing(tmp_path: Path, classic: tuple[Tensors, dict[str, Any]]) -> None:
    folder = write(tmp_path, classic[0], classic[1] | {"quantization_config": {"quant_method": "awq"}})
    for open_it in (open_checkpoint, open_language):
        with pytest.raises(WeightsError, match="quant_method 'awq'"):
            open_it(folder)


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_language_model_alone(
    tmp_path: Path, language: Tensors, write_meta: Callable[..., Path], write_hf: Callable[..., Path], layout: str
) -> None:
    folder = (write_meta if layout == "meta" else write_hf)(tmp_path, language)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.kind == "language" and checkpoint.language is not None
    assert checkpoint.settings is None and checkpoint.vision is None and checkpoint.projector is None
    assert len(dict(checkpoint.language.stream())) == len(language)


@pytest.mark.parametrize("prefix", ["model.", "transformer.", "base_model.model.model."])
def test_a_projector_alone(tmp_path: Path, classic: tuple[Tensors, dict[str, Any]], prefix: str) -> None:
    projector = {n: t for n, t in renamed(classic[0], LLAVA).items() if "mm_projector" in n}
    torch.save({n.replace("model.", prefix, 1): t for n, t in projector.items()}, tmp_path / "mm_projector.bin")
    checkpoint = open_checkpoint(tmp_path / "mm_projector.bin")
    assert checkpoint.kind == "projector" and checkpoint.settings is None and checkpoint.language is None
    assert checkpoint.projector is not None
    assert torch.equal(checkpoint.projector["layers.1.weight"], projector["model.mm_projector.2.weight"])
    (tmp_path / "config.json").write_text(json.dumps(TEXT | SAID))
    beside = open_checkpoint(tmp_path)
    assert beside.kind == "projector" and beside.settings is not None
    assert beside.settings.projector == "mlp2x_gelu"


def lora_folder(folder: Path, classic: tuple[Tensors, dict[str, Any]], *, with_config: bool) -> Path:
    """As LLaVA and Bunny leave it: PEFT's two files, what was trained beside, and the model's config.json."""
    peft = pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder)
    beside = {
        f"base_model.model.{n}": t for n, t in renamed(classic[0], LLAVA).items() if "_projector" in n or "newl" in n
    }
    torch.save(beside, folder / "non_lora_trainables.bin")
    if with_config:
        (folder / "config.json").write_text(json.dumps(TEXT | SAID))
    return folder


def test_a_lora_folder(tmp_path: Path, classic: tuple[Tensors, dict[str, Any]]) -> None:
    checkpoint = open_checkpoint(lora_folder(tmp_path, classic, with_config=True))
    assert checkpoint.kind == "lora" and checkpoint.language is None and checkpoint.vision is None
    assert checkpoint.lora is not None and checkpoint.lora_config is not None and checkpoint.projector is not None
    assert (checkpoint.lora_config.rank, checkpoint.lora_config.alpha) == (4, 8)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert len(checkpoint.lora) == len(file)
    theirs = file["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
    assert torch.equal(checkpoint.lora["layers.1.attention.v.lora.a"], theirs)
    assert len(checkpoint.projector) == 4 and checkpoint.image_newline is not None


def test_a_lora_whose_tower_was_trained(tmp_path: Path, classic: tuple[Tensors, dict[str, Any]]) -> None:
    """The tower of non_lora_trainables.bin, of which none is read before it is asked for; whole or an error."""
    folder = lora_folder(tmp_path, classic, with_config=True)
    path, prefix = folder / "non_lora_trainables.bin", "base_model.model.model.vision_tower."
    content = torch.load(path, weights_only=True)
    content |= {prefix + name: tensor for name, tensor in classic[0].items() if name.startswith("vision_tower.")}
    torch.save(content, path)
    vision = open_checkpoint(folder).vision
    assert vision is not None and vision.files[-1] == path and vision.config.layers_run == 2
    theirs = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"
    assert torch.equal(vision.fetch("layers.1.mlp.up.bias"), classic[0][theirs])  # type: ignore[arg-type]
    assert not vision.allocated("layers.1.mlp.up.bias")
    del content[prefix + theirs]
    torch.save(content, path)
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(folder)
    assert caught.value.missing == [prefix + theirs]


def test_a_lora_beside_a_whole_model(tmp_path: Path, classic: tuple[Tensors, dict[str, Any]]) -> None:
    lora_folder(write(tmp_path, renamed(classic[0], LLAVA), TEXT | SAID), classic, with_config=True)
    with pytest.raises(WeightsError, match=r"holds a LoRA .* and a whole model too"):
        open_checkpoint(tmp_path)


def test_a_lora_folder_without_settings_needs_the_model(
    tmp_path: Path, classic: tuple[Tensors, dict[str, Any]]
) -> None:
    folder = lora_folder(tmp_path / "lora", classic, with_config=False)
    with pytest.raises(WeightsError, match="has LoRA adapters and no config"):
        open_checkpoint(folder)
    base = open_checkpoint(write(tmp_path / "base", *classic)).language
    assert base is not None
    assert open_checkpoint(folder, base=base.config).lora is not None


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TEXT | SAID))
    with pytest.raises(WeightsError, match="is no checkpoint"):
        open_checkpoint(tmp_path)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not there"):
        open_checkpoint(tmp_path / "weights")


def test_metas_settings_without_its_shards(tmp_path: Path, language: Tensors, write_hf: Callable[..., Path]) -> None:
    """As where a repository of Meta's was downloaded without its folder `original`."""
    (write_hf(tmp_path, language) / "params.json").write_text("{}")
    opened = open_checkpoint(tmp_path).language
    assert opened is not None and not opened.config.rope_interleaved
