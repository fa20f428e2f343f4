"""A whole tiny world for end-to-end tests: weights in the layouts of the real ones, a tokenizer, ScienceQA, rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

from engine.demo.base import fresh_base, write_base
from engine.demo.tokenizer import train_tokenizer
from models.language.llama import LlamaConfig
from models.vision.clip import ClipConfig

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
SUBJECTS = ("natural science", "social science", "language science")
TOWER = ClipConfig(width=32, num_layers=6, num_heads=2, patch_size=8, image_size=16, mlp_dim=64)


def language_config(vocab_size: int) -> LlamaConfig:
    """dim 32, 2 layers; the MLP's width is no multiple of 64, so that NF4 blocks cross rows."""
    return LlamaConfig(vocab_size=vocab_size, dim=32, num_layers=2, num_heads=2, num_kv_heads=2, ffn_dim=72)


def make_tokenizer(path: Path, vocabulary: int = 330) -> int:
    """Writes a sentencepiece model; returns its number of pieces."""
    texts = [
        "Question: Which color is the picture? Context: N/A Options: (A) red (B) green (C) blue (D) gray (E) none",
        "Response:The answer is A. BECAUSE: The picture is red. green blue Image: N/A Instruction: What is shown?",
    ]
    train_tokenizer(texts * 20, path, vocabulary=vocabulary)
    return vocabulary


def make_base(folder: Path, tokenizer: Path, seed: int = 0) -> None:
    """A random LLaMA in Meta's layout with a tower/ beside it."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
    language = language_config(pieces)
    write_base(folder, language, TOWER, fresh_base(language, TOWER, seed))


def make_scienceqa(root: Path, num_train: int = 24, num_test: int = 12) -> None:
    """Half of the problems ask for the colour of their picture, half have it in the hint."""
    rng = random.Random(0)
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    problems = {}
    for number in range(num_train + 2 * num_test):
        split = "train" if number < num_train else "val" if number < num_train + num_test else "test"
        qid, names = str(number + 1), sorted(COLORS)
        rng.shuffle(names)
        names = names[: 2 + number % 2]
        color = rng.choice(names)
        has_image = number % 2 == 0
        if has_image:
            folder = root / "images" / split / qid
            folder.mkdir(parents=True)
            Image.new("RGB", (20, 16), COLORS[color]).save(folder / "image.png")
        problems[qid] = {
            "question": "Which color is the picture?", "choices": names, "answer": names.index(color),
            "hint": "" if has_image else f"It is {color}.", "image": "image.png" if has_image else None,
            "task": "closed choice", "grade": f"grade{1 + number % 12}", "subject": SUBJECTS[number % 3],
            "topic": "colors", "category": "colors", "skill": "Name a color", "lecture": "Look.",
            "solution": f"It is {color}.", "split": split,
        }  # fmt: skip
        splits[split].append(qid)
    splits["trainval"] = splits["train"] + splits["val"]
    splits |= {f"mini{name}": splits[name][:4] for name in ("train", "val", "test")}
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps(splits))
    (root / "captions.json").write_text(json.dumps({"captions": dict.fromkeys(problems, "a picture")}))


def make_rows(folder: Path, count: int = 12) -> Path:
    """LLaVA-style rows, every second one with a picture; returns the .json."""
    names = sorted(COLORS)
    rows = []
    for i in range(count):
        color = names[i % 3]
        row = {
            "id": f"row-{i}",
            "conversations": [
                {"from": "human", "value": f"{'<image>' if i % 2 == 0 else ''}What is shown?"},
                {"from": "gpt", "value": f"It is {color}."},
            ],
        }
        if i % 2 == 0:
            row["image"] = f"{color}.png"
            Image.new("RGB", (16, 16), COLORS[color]).save(folder / f"{color}.png")
        rows.append(row)
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path
