"""What was quantized once is read again: the same bits, or the source where anything is wrong with it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.build import Sources, build_model
from engine.config import Config, Legacy, Model
from engine.demo.base import fresh_base, write_base
from engine.image_choices import choose_images
from engine.loading.cache import FORMAT, _crc, _header_crc, joined, manifest_crc
from engine.tensor_file import TensorWriter
from kernels.int8 import quantize_int8
from kernels.nf4 import quantize_nf4
from models.quantized import parts
from models.vlm import VisionLanguageModel
from models.weights import archive
from models.weights.language import open_language
from models.weights.towers import open_vision
from tests.world import TOWER, language_config

CPU = torch.device("cpu")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache."""
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A random LLaMA in Meta's layout and its tower; rows of the MLP are no multiples of NF4's blocks."""
    config = language_config(50)
    write_base(tmp_path / "base", config, TOWER, fresh_base(config, TOWER, 0))
    return tmp_path / "base"


def sources(base: Path, *, readable: bool = True) -> Sources:
    """The opened base; where it is not `readable` nobody may ask it for a tensor."""
    tower = open_vision(base / "tower")
    opened = Sources(open_language(base), tower, cast(Any, None), choose_images(Config(), tower.config))

    def refuse(name: str) -> Tensor:
        raise AssertionError(f"{name} was read from the source")

    if readable:
        return opened
    return replace(opened, language=replace(opened.language, fetch=refuse), vision=replace(opened.vision, fetch=refuse))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without what is merely noted, which other tests' runs may have switched on."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def configuration(base: Path, bits: str = "4bit", head: str = "16bit", vision: str = "16bit") -> Config:
    three = {"bits": cast(Any, bits), "bits_head": cast(Any, head), "bits_vision": cast(Any, vision)}
    return Config(**three, model=Model(language=str(base)))


def build(config: Config, opened: Sources, dtype: torch.dtype = torch.float16, **options: Any) -> VisionLanguageModel:
    return build_model(config, opened, device=CPU, dtype=dtype, **options)


def assert_same(got: VisionLanguageModel, expected: VisionLanguageModel) -> None:
    """Every parameter and everything that a packed weight says besides, bit for bit."""
    ours, theirs = dict(got.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert ours[name].dtype == parameter.dtype, name
        assert ours[name].requires_grad == parameter.requires_grad, name
        assert torch.equal(ours[name], parameter), name
    for name, module in expected.named_modules():
        if name.endswith(".quantized"):
            other: Any = got.get_submodule(name)
            assert (other.kind, other.shape, other.dtype) == (module.kind, module.shape, module.dtype), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "head", "vision"),
    [("4bit", "16bit", "16bit"), ("4bit", "4bit", "8bit"), ("8bit", "16bit", "4bit"), ("8bit", "8bit", "16bit")],
)
def test_the_second_start_has_the_same_bits_and_reads_no_source(
    base: Path, kept: Path, bits: str, head: str, vision: str, dtype: torch.dtype
) -> None:
    config = configuration(base, bits, head, vision)
    config.model.cache_weights = False
    expected = build(config, sources(base), dtype)
    assert not kept.exists()
    config.model.cache_weights = True
    assert_same(build(config, sources(base), dtype), expected)
    assert_same(build(config, sources(base, readable=False), dtype), expected)
    assert [path.name for path in sorted(kept.iterdir()) if not path.name.startswith(".")] == [folder(kept).name]


def folder(kept: Path) -> Path:
    """The one cache that is there."""
    (found,) = (path for path in kept.iterdir() if path.is_dir())
    return found


def test_nothing_is_kept_of_16_bit_layers_of_the_demo_or_where_nobody_wants_it(base: Path, kept: Path) -> None:
    build(configuration(base, "16bit"), sources(base))
    build(replace(configuration(base), model=Model()), sources(base))
    assert not kept.exists()


def test_ranks_other_than_the_main_one_write_nothing_and_read_what_is_there(base: Path, kept: Path) -> None:
    expected = build(configuration(base), sources(base), is_main=False)
    assert not kept.exists()
    build(configuration(base), sources(base))
    assert_same(build(configuration(base), sources(base, readable=False), is_main=False), expected)


def test_whatever_changes_the_bits_changes_the_key(base: Path, kept: Path) -> None:
    build(configuration(base), sources(base))
    others: list[Callable[[], object]] = [
        lambda: build(configuration(base, "8bit"), sources(base)),
        lambda: build(configuration(base, head="4bit"), sources(base)),
        lambda: build(configuration(base, vision="4bit"), sources(base)),
        lambda: build(configuration(base), sources(base), torch.bfloat16),
        lambda: os.utime(base / "consolidated.00.pth", ns=(1, 1)) or build(configuration(base), sources(base)),  # type: ignore[func-returns-value]
    ]
    for count, other in enumerate(others, 2):
        other()
        assert len([path for path in kept.iterdir() if path.is_dir()]) == count


def test_a_delta_and_how_it_is_added_change_the_key(base: Path, kept: Path) -> None:
    opened = sources(base)
    for legacy in (False, True):
        config = configuration(base)
        config.model.delta, config.legacy = "somewhere", Legacy(vicuna_permutation=legacy)
        build(config, opened)
    build(configuration(base), opened)
    assert len([path for path in kept.iterdir() if path.is_dir()]) == 3


def weights_file(cache: Path) -> Path:
    return cache / "weights.safetensors"


def cut(cache: Path) -> None:
    content = weights_file(cache).read_bytes()
    weights_file(cache).write_bytes(content[: len(content) // 2])


def flip(position: float) -> Callable[[Path], None]:
    def damage(cache: Path) -> None:
        content = bytearray(weights_file(cache).read_bytes())
        content[int(position * (len(content) - 1))] ^= 4
        weights_file(cache).write_bytes(content)

    return damage


def edit_manifest(cache: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["weights"].popitem()
    (cache / "manifest.json").write_text(json.dumps(manifest))


def forge(change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> Callable[[Path], None]:
    """A cache that is what was written, as all its checksums say, and does not fit the model: another writer's."""

    def damage(cache: Path) -> None:
        manifest = json.loads((cache / "manifest.json").read_text())
        tensors = load_file(weights_file(cache))
        del manifest["crc32"]
        change(tensors, manifest["weights"])
        save_file(tensors, weights_file(cache))
        for name, entry in manifest["weights"].items():
            entry["crc32"] |= {
                part: _crc(tensors[joined(name, part)]) for part in entry["crc32"] if joined(name, part) in tensors
            }
        manifest |= {"bytes": weights_file(cache).stat().st_size, "header": _header_crc(weights_file(cache))}
        manifest["crc32"] = manifest_crc(manifest)
        (cache / "manifest.json").write_text(json.dumps(manifest))

    return damage


Q = "language.layers.0.attention.q.weight"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "flipped in the header": flip(0.0005),
    "flipped in the first tensors": flip(0.2),
    "flipped in the last tensors": flip(1.0),
    "no weights": lambda cache: weights_file(cache).unlink(),
    "no manifest": lambda cache: (cache / "manifest.json").unlink(),
    "half a manifest": lambda cache: os.truncate(cache / "manifest.json", 100),
    "a manifest of no mapping": lambda cache: (cache / "manifest.json").write_text("[]"),
    "an edited manifest": edit_manifest,
    "a manifest without a bottom": lambda cache: (cache / "manifest.json").write_text("[" * 100_000),
    "codes of a smaller weight": forge(lambda tensors, _: tensors.update({f"{Q}.codes": tensors[f"{Q}.codes"][:9]})),
    "scales in 16 bits": forge(lambda tensors, _: tensors.update({f"{Q}.absmax2": tensors[f"{Q}.absmax2"].half()})),
    "a tensor that is not there": forge(lambda tensors, _: tensors.pop(f"{Q}.offset")),
    "a weight without parts": forge(lambda _, weights: weights[Q].update(crc32={})),
    "a weight of another dtype": forge(lambda _, weights: weights[Q].update(dtype="load")),
    "a weight too many": forge(lambda _, weights: weights.update({"language.more.weight": weights[Q]})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_said_and_made_again(
    base: Path, kept: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    config = configuration(base, head="4bit")
    expected = build(config, sources(base))
    DAMAGES[damage](folder(kept))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "nibble"):
        assert_same(build(config, sources(base), is_main=False), expected)
        assert warnings_of(caplog) == []  # the main rank says it
        assert_same(build(config, sources(base)), expected)
    (message,) = warnings_of(caplog)
    assert "damaged" in message and str(folder(kept)) in message
    assert_same(build(config, sources(base, readable=False)), expected)


def test_a_full_disk_is_said_beforehand(
    base: Path, kept: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 500_000_000))
    build(configuration(base), sources(base))
    (message,) = warnings_of(caplog)
    assert "0.50 GB are free" in message and "0.57 GB are missing" in message
    assert [path.name for path in kept.iterdir()] == [".lock"]


def test_a_disk_that_fails_on_the_way_costs_the_cache_and_not_the_run(
    base: Path, kept: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build(configuration(base), sources(base), is_main=False)
    written: list[str] = []
    write = TensorWriter.write

    def fails(self: TensorWriter, name: str, tensor: Tensor) -> int:
        written.append(name)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", fails)
    assert_same(build(configuration(base), sources(base)), expected)
    assert "No space left on device" in caplog.text
    assert [path.name for path in kept.iterdir()] == [".lock"] and len(written) == 6


def test_a_disk_that_is_full_on_the_way_costs_the_cache_and_not_the_run(
    base: Path, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As above, from the system: whatever still lies in a buffer is refused once more when the file is closed."""
    expected = build(configuration(base), sources(base), is_main=False)
    limit, signal_was = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (1_000, 20_000, 60_000):  # in the header, after the first tensors, in the middle
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
            caplog.clear()
            assert_same(build(configuration(base), sources(base)), expected)
            assert os.strerror(errno.EFBIG) in caplog.text
            assert [path.name for path in kept.iterdir()] == [".lock"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, signal_was)


def test_a_place_that_may_not_be_entered_costs_the_cache_and_not_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that is too long is refused as a closed folder is, also for root."""
    expected = build(configuration(base), sources(base), is_main=False)
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path / ("n" * 300)))
    assert_same(build(configuration(base), sources(base)), expected)
    assert "not kept" in caplog.text


def test_a_cache_that_may_not_be_read_is_said_and_left_alone(
    base: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = build(configuration(base), sources(base))
    inside = {path.name for path in folder(kept).iterdir()}
    read = Path.read_bytes

    def refuses(path: Path) -> bytes:
        if path.name == "manifest.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    with monkeypatch.context() as closed:
        closed.setattr(Path, "read_bytes", refuses)
        assert_same(build(configuration(base), sources(base)), expected)
    (message,) = warnings_of(caplog)
    assert "cannot be read" in message and "Permission denied" in message
    assert {path.name for path in folder(kept).iterdir()} == inside
    assert_same(build(configuration(base), sources(base, readable=False)), expected)


def test_a_cache_that_goes_while_it_is_opened_is_no_error(
    base: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where rank 0 takes a damaged one away: safetensors reads the header, then has torch map the file by name."""
    expected = build(configuration(base), sources(base))
    real = archive.safe_open

    def late(path: Path, **options: Any) -> Any:
        file = real(path, **options)
        if path.parent == folder(kept):
            raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")
        return file

    monkeypatch.setattr(archive, "safe_open", late)
    assert_same(build(configuration(base), sources(base), is_main=False), expected)


def test_another_rule_of_quantizing_needs_another_format() -> None:
    """What these values become, since FORMAT 1. Whoever changes the rule, or the layout of the parts, also changes
    FORMAT: caches of the older rule would be read on. All sums are exact, so they are the same in every order."""
    i = torch.arange(128 * 129)
    weight = (((i * 7919) % 1009 - 504) * (1 + (i // 64) % 7)).div(4096).view(128, 129).half()
    found = [{part: _crc(t) for part, t in parts(q).items()} for q in (quantize_nf4(weight), quantize_int8(weight))]
    assert (FORMAT, found) == (2, [
        {"codes": 1226211407, "absmax_codes": 2555938530, "absmax2": 3677950420, "offset": 1300223025},
        {"codes": 2531155106, "scale": 1808423479},
    ])  # fmt: skip


def test_what_a_killed_writer_left_is_swept_and_a_failed_load_leaves_nothing(base: Path, kept: Path) -> None:
    (kept / ".tmp-killed").mkdir(parents=True)
    opened, seen = sources(base), list[str]()

    def fetch(name: str) -> Tensor:
        seen.append(name)
        if len(seen) == 7:
            raise OSError("the cable")
        return opened.language.fetch(name)

    with pytest.raises(OSError, match="cable"):
        build(configuration(base), replace(opened, language=replace(opened.language, fetch=fetch)))
    assert [path.name for path in kept.iterdir()] == [".lock"]
    build(configuration(base), opened)  # nobody holds the lock any more
    assert folder(kept)


def test_one_process_writes_at_a_time(base: Path, kept: Path) -> None:
    kept.mkdir(parents=True)
    with (kept / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        build(configuration(base), sources(base))
        assert [path.name for path in kept.iterdir()] == [".lock"]
    build(configuration(base), sources(base))
    assert folder(kept)


def test_a_place_that_cannot_be_written_is_said(base: Path, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept.parent.write_text("a file where the folder should be")
    build(configuration(base), sources(base))
    assert "not kept" in caplog.text
