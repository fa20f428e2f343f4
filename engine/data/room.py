"""How long samples are, and whether there is room for text behind an image."""

from __future__ import annotations

from engine.config import LAVIN_LENGTH
from engine.errors import UsageError

SHORT, LONG, TILED = LAVIN_LENGTH, 2048, 4096
USUAL = ((SHORT, "LaVIN's"), (LONG, "LLaVA's and Bunny's"), (TILED, "LLaVA-NeXT's"))  # lengths, and whose they are
SOME_TEXT = 128  # tokens: a length that leaves less is not proposed
MANY = 100  # tokens of an image that are worth a word


def usual_length(tile_tokens: int, *, tiles: bool) -> int:
    """Tokens of a sample where nobody says how many: for images of so many tokens a tile, cut into several or not."""
    if tiles:
        return TILED
    return LONG if tile_tokens > MANY else SHORT


def check_room(max_seq_len: int, head: int, *, image_tokens: int, modality: bool) -> None:
    """Whether a token of text has room behind a head of so many tokens (`image_tokens` of them the image's), beside the
    modality token where the model has one.

    Raises:
        UsageError: it has none; says how many tokens are usual, and how many are enough.
    """
    needed = modality + head + 1
    if max_seq_len >= needed:
        return
    proposed = next((f"{n} ({whose}), or" for n, whose in USUAL if n >= needed + SOME_TEXT), "")
    of_image = f", {image_tokens} of them an image's" if image_tokens > MANY else ""
    one = ", one of them the modality token" if modality else ""
    raise UsageError(
        f"max_seq_len {max_seq_len} leaves no room for text", where="--dataset.max_seq_len",
        why=f"{needed - 1} tokens stand before the text{of_image}{one}",
        do=f"--dataset.max_seq_len {proposed}{' ' * bool(proposed)}at least {needed}",
    )  # fmt: skip
