"""LaVIN's visual neck: Linear(W, hidden) - SiLU - Linear(hidden, D), both with bias."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.projector import projector_mlp


class Projector(nn.Module):
    """Image tokens of the tower's width -> embeddings of the language model's width."""

    def __init__(self, vision_dim: int, hidden_dim: int, language_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, language_dim)

    def reset(self) -> None:
        """Xavier-uniform weights, zero biases."""
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:  # [M, W] -> [M, D]
        return projector_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, "silu")
