"""The conversations that models were trained on, as Jinja templates for processors of transformers and for servers.

A template writes what training wrote, with two exceptions that the ids need. There is one begin token, which the
template writes itself: a server tokenizes it without adding any. And training tokenized the chunks of text between
images apart, so that sentencepiece put a space before each of them, which it does not put behind a special token: there
is `<image> ` for `<image>` (29871, IMAGE, 29871, 13 and not 29871, IMAGE, 13), and a space behind the begin token.

A message's content is text, or a list of pictures and text as transformers has it; pictures come first, one
`<image>\\n` each, as in training.

Our own runs are trained in LaVIN's layout (engine/data/layout.py), which has a place for one picture at the start of a
conversation and none for a system prompt: LAVIN below. (Training tokenized `Image: N/A` and the text behind it apart: a
tokenizer that is not sentencepiece's has other ids there where there is no picture.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.language.config import DecoderConfig
from models.weights.write.llava import Project

CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
LLAMA3_THETA = 500_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """prompt = system_start + system + system_end, then (user | assistant) + text + its end, ...; what is to be
    answered ends with `ask`."""

    system: str
    system_start: str = ""
    system_end: str
    user: str
    user_end: str
    assistant: str
    assistant_end: str
    ask: str  # how an answer begins


def _two(end: str) -> Conversation:
    """Vicuna's, with another token at the end of an answer."""
    return Conversation(
        system=CURIOUS, system_end=" ", user="USER: ", user_end=" ", assistant="ASSISTANT: ", assistant_end=end,
        ask="ASSISTANT:",
    )  # fmt: skip


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


CONVERSATIONS = {
    "vicuna_v1": _two("</s>"),
    "bunny": _two("<|endoftext|>"),
    "bunny_llama": _two("<|end_of_text|>"),
    "imp_phi2": _two("</s>"),
    "imp_phi3": Conversation(
        system=CURIOUS, system_start="<|system|>\n", system_end="<|end|>", user="\n<|user|>\n", user_end="<|end|>",
        assistant="\n<|assistant|>\n", assistant_end="<|end|>", ask="\n<|assistant|>\n",
    ),
    "llava_llama_3": Conversation(
        system=HELPFUL, system_start=_header("system"), system_end="<|eot_id|>", user=_header("user"),
        user_end="<|eot_id|>", assistant=_header("assistant"), assistant_end="<|eot_id|>", ask=_header("assistant"),
    ),
}  # fmt: skip

_TEXT = (
    "{%- macro text(content, image) -%}"
    "{%- if content is string -%}{{ content | trim | replace('<image>\\n', image) }}"
    "{%- else -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{ image }}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
)
_LOOP = (
    "{%- set start = 1 if messages[0]['role'] == 'system' else 0 -%}"
    "{{- BOS + SYSTEM_START + (text(messages[0]['content'], IMAGE) if start else SYSTEM) + SYSTEM_END -}}"
    "{%- for message in messages[start:] -%}"
    "{%- if message['role'] == 'user' -%}{{- USER + text(message['content'], IMAGE) + USER_END -}}"
    "{%- else -%}{{- ASSISTANT + text(message['content'], IMAGE) + ASSISTANT_END -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ASK -}}{%- endif -%}"
)


_LAVIN = (
    "{%- set seen = namespace(picture=false) -%}"
    "{%- macro text(content) -%}"
    "{%- if content is string -%}"
    "{{ content | replace('<image>\\n', '') | replace('\\n<image>', '') | replace('<image>', '') | trim }}"
    "{%- else -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ raise_exception('the model was trained without a system prompt') }}"
    "{%- elif message['content'] is string -%}"
    "{%- if '<image>' in message['content'] -%}{%- set seen.picture = true -%}{%- endif -%}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{%- set seen.picture = true -%}{%- endfor -%}"
    "{%- endif -%}{%- endfor -%}"
    "{{- BOS + 'Image: ' + ('<image>' if seen.picture else 'N/A') -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- set question = text(message['content']) -%}{{- SPACE -}}ASKED{{- '\\nResponse:' -}}"
    "{%- else -%}{{- text(message['content']) + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
LAVIN = {  # by the data of the run: the question as engine/chat.py puts it
    "instruction": "{{- 'Instruction: ' + question -}}",
    "scienceqa": (
        "{%- set parts = question.partition('(A)') -%}"
        "{{- 'Question: ' + parts[0] | trim + '\\nContext: N/A\\nOptions: ' + (parts[1] + parts[2]) | trim -}}"
    ),
}


def template_name(config: DecoderConfig, tower: str, project: Project | Literal["auto"]) -> str:
    """The conversation that this language model is trained with beside a tower of this family: LLaVA's with CLIP,
    Bunny's with others; Imp's where `project` says so."""
    if config.family == "llama":
        if config.rope_theta != LLAMA3_THETA:
            return "vicuna_v1"
        return "llava_llama_3" if tower == "clip" and project != "bunny" else "bunny_llama"
    if project == "imp":
        return "imp_phi3" if config.family == "phi3" else "imp_phi2"
    return "bunny"


def jinja(name: str, *, begins: bool, spaced: bool) -> str:
    """The template of a conversation. `begins`: texts begin with the tokenizer's begin token; `spaced`: the
    tokenizer puts a space before a text and not behind a special token (sentencepiece)."""
    bos = "bos_token" + (' + " "' if spaced else "") if begins else _quoted("")
    if name in LAVIN:
        head = f"{{%- set BOS = {bos} -%}}{{%- set SPACE = {_quoted(' ' if spaced else '')} -%}}"
        return head + _LAVIN.replace("ASKED", LAVIN[name])
    conversation = CONVERSATIONS[name]
    values = {
        "SYSTEM_START": conversation.system_start, "SYSTEM_END": conversation.system_end, "SYSTEM": conversation.system,
        "USER_END": conversation.user_end, "USER": conversation.user, "ASSISTANT_END": conversation.assistant_end,
        "ASSISTANT": conversation.assistant, "ASK": conversation.ask, "IMAGE": "<image> \n" if spaced else "<image>\n",
    }  # fmt: skip
    sets = [f"{{%- set {key} = {_quoted(value)} -%}}" for key, value in values.items()]
    sets.append(f"{{%- set BOS = {bos} -%}}")
    return "".join(sets) + _TEXT + _LOOP


def _quoted(text: str) -> str:
    """`text` as Jinja's string literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
