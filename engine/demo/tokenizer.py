"""The demo's tokenizer: a small sentencepiece BPE model with LLaMA's conventions, trained on the demo's own text."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

VOCABULARY = 640


def train_tokenizer(texts: Iterable[str], path: Path, vocabulary: int = VOCABULARY) -> None:
    """Train on `texts` and write `tokenizer.model`; the same texts give the same bytes.

    As LLaMA's: byte fallback, no normalisation, a space before the first word, digits alone, unk 0, bos 1, eos 2.
    """
    model = io.BytesIO()
    # A newline becomes a byte piece, and the word after it has no space in front: a colon stands for it here, so that
    # words like "Context" are learnt without their space.
    lines = (text.replace("\n", ":") for text in texts)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
