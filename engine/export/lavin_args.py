"""What LaVIN's checkpoints say of the command line that wrote them: the `args` in checkpoint-N.pth."""

from __future__ import annotations

from dataclasses import asdict

from engine.config import Config


def lavin_args(config: Config) -> dict[str, object]:
    """A run's settings in LaVIN's words; the router's temperature among them, which no tensor says."""
    return {
        "bits": config.bits, "adapter_type": config.adapter.language, "visual_adapter_type": config.adapter.vision,
        "adapter_dim": config.adapter.dim, "adapter_scale": config.adapter.scale,
        "temperature": config.adapter.temperature, "hidden_proj": config.model.projector_hidden, "n_prompt": 6,
        "max_seq_len": config.dataset.max_seq_len, "prompt_format": config.dataset.prompt_format,
        "optim": asdict(config.optim), "seed": config.seed,
    }  # fmt: skip
