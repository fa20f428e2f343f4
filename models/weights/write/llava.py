"""Checkpoints as LLaVA, Bunny and Imp write them at the end of training: names of tensors and keys of config.json.

    model.embed_tokens ... lm_head                          the language model, as transformers names it
    model.mm_projector.{0,2}.{weight,bias}, model.image_newline
    model.vision_tower.vision_tower.vision_model. ...       CLIP, SigLIP; EVA's begin with ...vision_tower.model.

The three read one another's files by the model_type in config.json. LLaVA knows LLaMA with CLIP, and the only one with
tiles that are put together (spatial, spatial_unpad); Imp keeps the bias of Phi's head, which Bunny's Phi does not have.

Their config.json names the tower and does not describe it: their loaders read its config.json where `mm_vision_tower`
points. Ours has the tower's numbers too, under the key that transformers has for them (`vision_config`), so that a
checkpoint whose tower is none of the published ones can be read wherever it lies; the three pay no attention to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from models.weights.lora_settings import CONFIG_NAME
from models.weights.projector_names import BUNNY as BUNNY_PROJECTORS
from models.weights.projector_names import their_projector_name
from models.weights.settings import read_settings
from models.weights.vlm_settings import VLMSettings
from models.weights.write.entries import Entries, Entry, renamed
from models.weights.write.language import language_names, language_settings
from models.weights.write.tower import IN_TRANSFORMERS, tower_settings
from models.weights.write.vlm import LanguagePart, VLMParts

Project = Literal["llava", "bunny", "imp"]
LLAVA = {"llama": ("llava_llama", "LlavaLlamaForCausalLM")}
BUNNY = {
    "llama": ("bunny-llama", "BunnyLlamaForCausalLM"), "phi": ("bunny-phi", "BunnyPhiForCausalLM"),
    "phi3": ("bunny-phi3", "BunnyPhi3ForCausalLM"), "stablelm": ("bunny-stablelm", "BunnyStableLMForCausalLM"),
}  # fmt: skip
IMP = {"phi": ("imp", "ImpForCausalLM"), "phi3": ("imp_phi3", "ImpPhi3ForCausalLM")}
CLASSES: dict[Project, Mapping[str, tuple[str, str]]] = {"llava": LLAVA, "bunny": BUNNY, "imp": IMP}
BY_NAME: tuple[Project, ...] = ("llava", "imp")  # whose loaders look for the project in a folder's name
TOWERS: dict[Project, tuple[str, ...]] = {
    "llava": ("clip",), "bunny": ("clip", "siglip", "eva"), "imp": ("clip", "siglip"),
}  # fmt: skip
PROJECTOR = "model.mm_projector."
NEWLINE = "model.image_newline"
TOWER = "model.vision_tower.vision_tower."
DEFAULT_LENGTH = 2048  # tokens, where nobody said it: what the three fall back to


class FormatError(ValueError):
    """What the format cannot say of this model."""


def project_of(language: LanguagePart, tower: str, settings: VLMSettings) -> Project:
    """Whose format says all of this model: LLaVA's, else Imp's where Phi's head has a bias, else Bunny's.

    Raises:
        FormatError: none does.
    """
    family = language.config.family
    candidates: list[Project] = ["llava", "imp", "bunny"] if language.config.head_bias else ["llava", "bunny", "imp"]
    reasons = []
    for project in candidates:
        reason = why_not(project, language, tower, settings)
        if not reason:
            return project
        reasons.append(f"{project}: {reason}")
    raise FormatError(f"no format for {family} with a tower of {tower}: " + "; ".join(reasons))


def why_not(project: Project, language: LanguagePart, tower: str, settings: VLMSettings) -> str:
    """What keeps this model out of the format of `project`; empty where nothing does."""
    if language.config.family not in CLASSES[project]:
        return f"has {', '.join(CLASSES[project])}, no {language.config.family}"
    if tower not in TOWERS[project]:
        return f"has towers of {', '.join(TOWERS[project])}, no {tower}"
    if project != "llava" and (settings.merge != "flat" or settings.aspect_ratio == "anyres"):
        return f"has one tile an image, no {settings.merge} of {settings.aspect_ratio}"
    if project == "bunny" and language.config.head_bias:
        return "has no bias in the head, which this model has"
    if project == "bunny" and (settings.select_layer, settings.select_feature) != (-2, "patch"):
        return f"takes patches of layer -2, not {settings.select_feature} of layer {settings.select_layer}"
    if project != "bunny" and settings.scales:
        return f"sees a picture at one size, not at {', '.join(map(str, settings.scales))} pixels (S2)"
    if project != "bunny" and settings.projector in BUNNY_PROJECTORS:
        return f"has no {settings.projector} projector"
    return ""


def llava_entries(parts: VLMParts) -> dict[str, Entry]:
    """Every tensor of a whole checkpoint, under the three projects' names."""
    language = language_names(parts.language.entries, parts.language.config)
    newline = {} if parts.image_newline is None else {NEWLINE: parts.image_newline}
    projector = projector_entries(parts.projector, parts.settings.projector)
    return language | projector | newline | tower_entries(parts)


def projector_entries(projector: Entries, kind: str) -> dict[str, Entry]:
    """A projector of this kind: `model.mm_projector.0.weight`."""
    return renamed(projector, lambda name: PROJECTOR + their_projector_name(name, kind))


def tower_entries(parts: VLMParts) -> dict[str, Entry]:
    """The tower, with the layers that are not run, which the three's loaders expect."""
    return renamed(parts.tower.entries, TOWER.__add__)


def llava_settings(
    parts: VLMParts, project: Project, *, projector_only: bool = False, projector_lr: float | None = None
) -> dict[str, object]:
    """config.json, with the keys that this project writes and reads. `projector_only`: of a training of the projector
    alone; `projector_lr`: at which it was trained."""
    language = parts.language
    model_type, architecture = CLASSES[project][language.config.family]
    out = language_settings(language.config, language.said, language.dtype)
    out |= {"model_type": model_type, "architectures": [architecture], "use_cache": True}
    out |= _common(parts) | {"mm_projector_lr": projector_lr, "tune_mm_mlp_adapter": projector_only}
    return out | _own(parts.settings, project) | _described(parts)


def folder_notes(folder: Path) -> list[str]:
    """What the loaders of the three, which go by a folder's name, would not find in that of this checkpoint."""
    config = folder / "config.json"
    said = read_settings(config).values.get("model_type") if config.is_file() else None
    project = next((p for p, kinds in CLASSES.items() if said in [kind for kind, _ in kinds.values()]), None)
    if project is None:
        return []
    name, is_lora, notes = folder.name.lower(), (folder / CONFIG_NAME).is_file(), []
    if project in BY_NAME and project not in name:
        notes.append(f"the loader of {said} looks for {project!r} in the folder's name")
    if is_lora != ("lora" in name):
        rule = "'lora' in its name" if is_lora else "a name without 'lora'"
        notes.append(f"the loader of {said} takes a folder for a LoRA by its name: give it {rule}")
    return notes


def _common(parts: VLMParts) -> dict[str, object]:
    settings = parts.settings
    return {
        "mm_vision_tower": settings.tower, "use_mm_proj": True, "mm_projector_type": settings.projector,
        "mm_hidden_size": parts.tower.config.width * max(1, len(settings.scales)),
        "image_aspect_ratio": settings.aspect_ratio,
        "freeze_mm_mlp_adapter": False, "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": settings.max_length or DEFAULT_LENGTH,
    }  # fmt: skip


def _described(parts: VLMParts) -> dict[str, object]:
    """The tower's shape, all its layers counted. EVA's says everything by its tensors."""
    config = parts.tower.config
    return {"vision_config": tower_settings(config)} if config.family in IN_TRANSFORMERS else {}


def _own(settings: VLMSettings, project: Project) -> dict[str, object]:
    if project == "bunny":
        scales = {"s2_scales": ",".join(map(str, settings.scales))} if settings.scales else {}
        return {"use_s2": bool(settings.scales), **scales, "unfreeze_vision_tower": settings.tower_trained}
    out: dict[str, object] = {
        "mm_vision_select_layer": settings.select_layer, "mm_vision_select_feature": settings.select_feature,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "unfreeze_mm_vision_tower": settings.tower_trained,
    }  # fmt: skip
    if project == "llava":
        out["mm_patch_merge_type"] = settings.merge
        if settings.grid_pinpoints:
            out["image_grid_pinpoints"] = [list(size) for size in settings.grid_pinpoints]
    return out
