"""LaVIN's chat data: all_data.json, one question and answer an entry, instructions stored ready-made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.data.fields import read_json, take
from engine.data.images import resolve
from engine.data.layout import Layout
from engine.data.sample import Sample
from engine.errors import DataError


class ChatData:
    """Entries {instruction, answer, image, image_source, qid} under the key "all" of `path`.

    Images lie under `root`: source mscoco in images/train2014/COCO_train2014_{image}, source sqa in
    images/train/{qid}/image.png. LaVIN lays out to 512 tokens whatever --max_seq_len says; a layout with that length
    reproduces it.

    Raises:
        DataError: the file, a key or an image is missing or of another shape; names file and entry.
    """

    def __init__(self, path: str | Path, root: str | Path, layout: Layout) -> None:
        self.path = Path(path)
        self.root = Path(root)
        self.layout = layout
        do = "name the folder that holds all_data.json with --dataset.root"
        self._entries: list[dict[str, Any]] = take(read_json(self.path, do), "all", list, str(path))
        if not self._entries:
            raise DataError("the file has no entries", where=str(path))
        self._images = [self._check(index) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self._entries)

    def where(self, index: int) -> str:
        return f"{self.path}, entry {index + 1}"

    def sample(self, index: int) -> Sample:
        """Instruction and answer, laid out for training."""
        entry = self._entries[index]
        return self.layout.pair(entry["qid"], entry["instruction"], entry["answer"], self._images[index])

    def _check(self, index: int) -> str | None:
        entry, where = self._entries[index], self.where(index)
        for key in ("instruction", "answer", "qid"):
            take(entry, key, str, where)
        image = take(entry, "image", (str, type(None)), where)
        if image is None:
            return None
        source = take(entry, "image_source", str, where)
        if source == "mscoco":
            return resolve(str(self.root / "images" / "train2014"), f"COCO_train2014_{image}", where)
        if source == "sqa":
            return resolve(str(self.root / "images" / "train"), f"{entry['qid']}/image.png", where)
        raise DataError(f"'image_source' must be mscoco or sqa, got {source!r}", where=where)
