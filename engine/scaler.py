"""The loss scale of fp16 training.

Small fp16 gradients would vanish, so the loss is multiplied by a power of two and the gradients are divided by it
again. Where the scaled gradients overflow, the step is REPEATED with half the scale (the trainer calls `backoff()` and
runs the same samples again): no sample is lost and no step is skipped, the first one included.
"""

from __future__ import annotations

from dataclasses import dataclass

INITIAL_SCALE = 65536.0
GROWTH_INTERVAL = 2000  # good steps in a row before the scale is doubled


@dataclass(slots=True)
class LossScaler:
    """Starts at 65536, halves at an overflow, doubles after 2,000 good steps.

    Disabled (bf16, fp32) the scale is 1 and stays there. Powers of two only: scaling is exact.
    """

    enabled: bool
    scale: float = INITIAL_SCALE
    good_steps: int = 0

    def __post_init__(self) -> None:
        if not self.enabled:
            self.scale = 1.0

    def backoff(self) -> bool:
        """After a step with a non-finite value: halve the scale. Returns whether to repeat the step; False at scale 1,
        where the value is not the scale's fault."""
        self.good_steps = 0
        if self.scale <= 1.0:
            return False
        self.scale *= 0.5
        return True

    def good_step(self) -> None:
        """After an update."""
        if not self.enabled:
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.scale *= 2.0
            self.good_steps = 0

    def state(self) -> dict[str, float]:
        """For the checkpoint's JSON."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        """Continue where a checkpoint stopped. A disabled scaler stays disabled: its run has another precision now."""
        if self.enabled:
            self.scale = float(state["scale"])
            self.good_steps = int(state["good_steps"])
