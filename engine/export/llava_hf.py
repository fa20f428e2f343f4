"""--to llava-hf: transformers' LLaVA with its processor, a tokenizer that knows <image>, and a chat template."""

from __future__ import annotations

from pathlib import Path

from engine.data.tokenizer import open_tokenizer
from engine.export.assemble import vlm_parts
from engine.export.chat_templates import LAVIN, jinja, template_name
from engine.export.config import ExportConfig
from engine.export.dtypes import export_dtype
from engine.export.folder import write_json
from engine.export.formats import GENERATION, Plan, generation_of, write_model
from engine.export.origin import Origin
from engine.export.tokenizer_files import (
    PAD,
    add_tokens,
    begins_texts,
    copy_tokenizer,
    needs_padding,
    next_free,
    puts_space_before,
    tokenizer_folder,
)  # fmt: skip
from models.weights.write.entries import size_of
from models.weights.write.generation import LLAMA3_END_OF_TURN
from models.weights.write.language import guesses
from models.weights.write.llava_hf import hf_entries, hf_settings, require_expressible
from models.weights.write.processor import IMAGE_TOKEN, preprocessor_settings, processor_class, processor_settings
from models.weights.write.vlm import VLMParts
from models.weights.write.vocabulary import free_token, padded_vocabulary


def plan_llava_hf(origin: Origin, config: ExportConfig) -> Plan:
    """transformers' LlavaForConditionalGeneration, or LlavaNext's where tiles of anyres are put together."""
    parts = vlm_parts(origin, export_dtype(origin, config.dtype))
    require_expressible(parts)
    tokens = new_tokens(tokenizer_folder(origin.folders), parts)
    image = tokens[IMAGE_TOKEN]
    rows = padded_vocabulary(parts.language.config.vocab_size, image)
    entries = hf_entries(parts, rows)
    template, notes = _template(origin, parts, config)
    generation = generation_of(origin, parts.language, _ends_with(origin, template))

    def write(folder: Path) -> None:
        settings = hf_settings(parts, rows, image, generation.get("eos_token_id"))
        write_model(folder, entries, settings, config)
        write_json(folder / GENERATION, generation)
        write_json(folder / "preprocessor_config.json", preprocessor_settings(parts))
        write_json(folder / "processor_config.json", processor_settings(parts))
        copy_tokenizer(origin.folders, folder)
        _write_tokenizer(folder, tokens, template, processor_class(parts))

    return Plan(size_of(entries), write, [*guesses(parts.language.config, parts.language.said), *notes])


def new_tokens(folder: Path, parts: VLMParts) -> dict[str, int]:
    """The tokens that the tokenizer in `folder` is to get, with their ids: <image>, behind <pad> where there is nothing
    to pad with, and behind names for ids that the model's vocabulary has and the tokenizer does not."""
    padding = parts.language.said.get("pad_token_id")
    first = next_free(folder)
    image = free_token(first, parts.language.config.vocab_size, padding if isinstance(padding, int) else None)
    if needs_padding(folder) and image == first:
        image += 1
    names = [PAD if needs_padding(folder) and i == first else f"<extra_{i}>" for i in range(first, image)]
    return dict(zip([*names, IMAGE_TOKEN], range(first, image + 1), strict=True))


def _template(origin: Origin, parts: VLMParts, config: ExportConfig) -> tuple[str, list[str]]:
    """-> (the name of a conversation, empty for none; a note where it was chosen by the model's numbers)"""
    if config.template != "auto":
        return "" if config.template == "none" else config.template, []
    if origin.template:
        return origin.template, []
    language, tower = parts.language.config, parts.tower.config.family
    name = template_name(language, tower, config.project)
    by = f"{language.family} with rope_theta {language.rope_theta:g} and a tower of {tower}"
    return name, [f"the chat template is {name}, chosen for {by}: no file says it; --template names another"]


def _ends_with(origin: Origin, template: str) -> int | None:
    """The token that ends an answer, where the language model's own settings may not name it."""
    if template in LAVIN:
        return open_tokenizer(tokenizer_folder(origin.folders)).eos_id
    return LLAMA3_END_OF_TURN if template == "llava_llama_3" else None


def _write_tokenizer(folder: Path, tokens: dict[str, int], template: str, processor: str) -> None:
    """The tokens, and the template beside the tokenizer (for servers) and beside the processor."""
    begins, spaced = begins_texts(folder), puts_space_before(folder)
    settings: dict[str, object] = {"processor_class": processor, "padding_side": "left", "image_token": IMAGE_TOKEN}
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # the language model's own, which was not trained on
    if template:
        text = jinja(template, begins=begins, spaced=spaced)
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        settings["chat_template"] = text
    add_tokens(folder, tokens, **settings)
