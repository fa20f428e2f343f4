"""LaVIN's token layout (arXiv 2305.15023; its modality token, which stands before all this, belongs to the pack).

    with an image   BOS  "Image: "     K image slots  text ...  EOS
    text only       BOS  "Image: N/A"                 text ...  EOS

The head is tokenised apart from the text, so the text begins with its own word-start piece. Prompt and answer are
tokenised together; the answer begins where the prompt alone would end. Everything is cut to max_seq_len - 1 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.data.sample import IGNORE, Sample
from engine.data.tokenizer import Tokenizer
from engine.errors import DataError, UsageError


@dataclass(frozen=True, slots=True)
class Layout:
    """Lays out text with this tokenizer. `max_seq_len` counts the modality token; an image takes `image_tokens`."""

    tokenizer: Tokenizer
    max_seq_len: int = 512
    image_tokens: int = 6

    def __post_init__(self) -> None:
        needed = max(len(self._head(has_image)) for has_image in (False, True)) + 2
        if self.max_seq_len < needed:
            raise UsageError(
                f"max_seq_len {self.max_seq_len} leaves no room for text",
                where="--dataset.max_seq_len",
                why=f"the modality token, BOS and the image's head take {needed - 1} tokens",
                do=f"give at least {needed}; LaVIN trains with 512",
            )

    def pair(self, id: str, prompt: str, answer: str, image: str | None = None) -> Sample:
        """A prompt and its answer. The answer and EOS are targets; `image` is an absolute path."""
        return self.turns(id, [(prompt, answer)], image)

    def turns(self, id: str, turns: Sequence[tuple[str, str]], image: str | None = None) -> Sample:
        """Prompts and answers one after another. Each turn is tokenised by itself; its answer and the EOS behind it
        are targets.

        Id 0 (<unk>, which is also the padding of LaVIN's data) is never a target.
        """
        ids, labels = [self.tokenizer.bos_id], [IGNORE]
        for prompt, answer in turns:
            start = len(self.tokenizer.encode(prompt))
            turn = self.tokenizer.encode(prompt + answer, eos=True)
            ids += turn
            labels += [IGNORE] * start + [token or IGNORE for token in turn[start:]]
        return self._sample(id, ids, labels, image)

    def prompt_only(self, id: str, prompt: str, image: str | None = None) -> Sample:
        """A prompt to be continued: no EOS, no targets.

        Raises:
            DataError: the prompt does not fit. Cutting it would take away the part that asks for the answer.
        """
        ids = self._encode(prompt)
        sample = self._sample(id, ids, [IGNORE] * len(ids), image)
        if sample.truncated:
            length = len(self._head(image is not None)) + len(ids) - 1
            raise DataError(
                f"the prompt has {length} tokens, {self.max_seq_len - 1} fit",
                where=id,
                do=f"shorten it or give --dataset.max_seq_len {length + 1}",
            )
        return sample

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=True)

    def _head(self, has_image: bool) -> list[int]:
        head = self.tokenizer.encode("Image: " if has_image else "Image: N/A", bos=True)
        return head + [0] * self.image_tokens if has_image else head

    def _sample(self, id: str, ids: list[int], labels: list[int], image: str | None) -> Sample:
        head = self._head(image is not None)  # replaces the BOS of ids
        limit = self.max_seq_len - 1
        slots = range(len(head) - self.image_tokens, len(head)) if image is not None else ()
        return Sample(
            id=id,
            input_ids=(head + ids[1:])[:limit],
            labels=([IGNORE] * len(head) + labels[1:])[:limit],
            image=image,
            image_slots=list(slots),
            truncated=len(head) + len(ids) - 1 > limit,
        )
