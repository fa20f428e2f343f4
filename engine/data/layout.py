"""LaVIN's token layout (arXiv 2305.15023; its modality token, which stands before all this, belongs to the pack).

    with an image   BOS  "Image: "     K image slots  text ...  EOS
    text only       BOS  "Image: N/A"                 text ...  EOS

The head is tokenised apart from the text, so the text begins with its own word-start piece. Prompt and answer are
tokenised together; the answer begins where the prompt alone would end. Everything is cut to max_seq_len tokens, the
modality token among them where the model has one. A tokenizer without a begin token (Phi, StableLM) puts no BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.data.anyres import Anyres, ImageTokens
from engine.data.images import image_size
from engine.data.room import check_room
from engine.data.sample import IGNORE, Sample
from engine.data.tokenizer import Tokenizer
from engine.errors import DataError


@dataclass(frozen=True, slots=True)
class Layout:
    """Lays out text with this tokenizer.

    `max_seq_len` counts the modality token, where there is one; an image takes `image_tokens`, or as many as its size
    gives it.

    Raises:
        UsageError: an image (with anyres the largest) leaves no room for text.
    """

    tokenizer: Tokenizer
    max_seq_len: int = 512
    image_tokens: int | Anyres = 6
    modality: bool = True  # the model has modality tokens

    def __post_init__(self) -> None:
        most = self.image_tokens.most_tokens() if isinstance(self.image_tokens, Anyres) else self.image_tokens
        head = max(len(self._head(None)), len(self._head(ImageTokens(most))))
        check_room(self.max_seq_len, head, image_tokens=most, modality=self.modality)

    @property
    def _limit(self) -> int:
        """Tokens of a sample, at most."""
        return self.max_seq_len - self.modality

    def pair(self, id: str, prompt: str, answer: str, image: str | None = None) -> Sample:
        """A prompt and its answer. The answer and EOS are targets; `image` is an absolute path."""
        return self.turns(id, [(prompt, answer)], image)

    def turns(self, id: str, turns: Sequence[tuple[str, str]], image: str | None = None) -> Sample:
        """Prompts and answers one after another. Each turn is tokenised by itself; its answer and the EOS behind it
        are targets.

        The unknown token (id 0, which is also the padding of LaVIN's data) is never a target, unless it is the end too
        (Phi's).
        """
        never = self.tokenizer.unk_id if self.tokenizer.unk_id != self.tokenizer.eos_id else None
        ids, labels = list[int](), list[int]()
        for prompt, answer in turns:
            start = len(self.tokenizer.encode(prompt))
            turn = self.tokenizer.encode(prompt + answer, eos=True)
            ids += turn
            labels += [IGNORE] * start + [IGNORE if token == never else token for token in turn[start:]]
        return self._sample(id, ids, labels, image)

    def prompt_only(self, id: str, prompt: str, image: str | None = None) -> Sample:
        """A prompt to be continued: no EOS, no targets.

        Raises:
            DataError: the prompt does not fit. Cutting it would take away the part that asks for the answer.
        """
        ids = self.tokenizer.encode(prompt)
        sample = self._sample(id, ids, [IGNORE] * len(ids), image)
        if sample.truncated:
            length = len(self._head(self._tokens(image, id))) + len(ids)
            raise DataError(
                f"the prompt has {length} tokens, {self._limit} fit",
                where=id,
                do=f"shorten it or give --dataset.max_seq_len {length + self.modality}",
            )
        return sample

    def _tokens(self, image: str | None, id: str) -> ImageTokens | None:
        """Those of an image; None where there is none."""
        if image is None:
            return None
        if isinstance(self.image_tokens, Anyres):
            return self.image_tokens.of(image_size(image, id))
        return ImageTokens(self.image_tokens)

    def _head(self, tokens: ImageTokens | None) -> list[int]:
        if tokens is None:
            return self.tokenizer.encode("Image: N/A", bos=True)
        return self.tokenizer.encode("Image: ", bos=True) + [0] * tokens.count

    def _sample(self, id: str, ids: list[int], labels: list[int], image: str | None) -> Sample:
        tokens = self._tokens(image, id)
        head = self._head(tokens)
        slots = range(len(head) - tokens.count, len(head)) if tokens is not None else ()
        return Sample(
            id=id,
            input_ids=(head + ids)[: self._limit],
            labels=([IGNORE] * len(head) + labels)[: self._limit],
            image=image,
            image_slots=list(slots),
            truncated=len(head) + len(ids) > self._limit,
            num_tiles=1 if tokens is None else tokens.num_tiles,
            image_rows=None if tokens is None else tokens.rows,
        )
