"""generation_config.json that transformers takes: the source's, with what it would refuse put right."""

from __future__ import annotations

from collections.abc import Mapping

# Vicuna v1.5 has a temperature and top_p without do_sample, at which transformers refuses to save (LLaVA issue 1144).
OF_SAMPLING = ("temperature", "top_p", "top_k", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff")
LLAMA3_END_OF_TURN = 128009  # <|eot_id|> ends an answer; LLaMA-3's config.json names only 128001


def generation_settings(
    said: Mapping[str, object] | None, settings: Mapping[str, object], *, answers_end_with: int | None = None,
) -> dict[str, object]:  # fmt: skip
    """-> generation_config.json. `said`: the source's; `settings`: the language model's config.json, which names the
    tokens where `said` does not; `answers_end_with`: a token that must end an answer too."""
    out = {
        key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if settings.get(key) is not None
    }
    out |= {key: value for key, value in (said or {}).items() if value is not None}
    out.pop("transformers_version", None)
    if not out.get("do_sample") and any(key in out for key in OF_SAMPLING):
        out["do_sample"] = True
    if answers_end_with is not None:
        out["eos_token_id"] = with_end(out.get("eos_token_id"), answers_end_with)
    return {"_from_model_config": True} | out if not said else out


def with_end(ends: object, token: int) -> int | list[int]:
    """The ids that end an answer, with `token` among them."""
    listed = [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
    every = list(dict.fromkeys([*listed, token]))
    return every[0] if len(every) == 1 else every
