"""A small tokenizer of LLaMA's kind (BPE, byte fallback, nothing normalised), trained in milliseconds."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from PIL import Image

from engine.data.layout import Layout
from engine.data.tokenizer import Tokenizer, open_tokenizer

REPOSITORY = Path(__file__).parents[3]

SENTENCES = [
    "Question: Which of these states is farthest north?",
    "Context: N/A",
    "Options: (A) West Virginia (B) Louisiana (C) Arizona (D) Oklahoma",
    "Response:The answer is A. BECAUSE: Maps have four cardinal directions.",
    "Instruction: What is on the table?",
    "Image: a cup and a plate",
]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return open_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def layout(tokenizer: Tokenizer) -> Layout:
    return Layout(tokenizer)


@pytest.fixture(scope="session")
def llama_tokenizer() -> Tokenizer:
    """The real one, where it can be found."""
    named = os.environ.get("NIBBLE_TOKENIZERS")
    folders = [*([Path(named)] if named else []), REPOSITORY.parent / "shared" / "data"]
    for folder in folders:
        if (folder / "llama" / "tokenizer.model").is_file():
            return open_tokenizer(folder / "llama" / "tokenizer.model")
    pytest.skip(f"no llama/tokenizer.model under {' or '.join(map(str, folders))}; set NIBBLE_TOKENIZERS")


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[str, Any], Path]:
    def write(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_image() -> Callable[..., Path]:
    def write(path: Path, color: tuple[int, int, int] = (10, 200, 30), size: tuple[int, int] = (12, 8)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path)
        return path

    return write
