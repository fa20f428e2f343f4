"""Checks across the fields of a configuration: what cannot work is an error, what does nothing is a warning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from engine.config import ChatConfig, Config, EvalConfig, Model, Optim, Runtime, get, leaves, trained_vision
from engine.data.prompts import check_format
from engine.errors import UsageError
from engine.memory_size import parse_size
from models.projectors.config import KINDS, MLP


@dataclass(frozen=True, slots=True)
class Bound:
    """low <= value < high, or low < value where `open_low`."""

    low: float
    high: float = float("inf")
    open_low: bool = False

    def holds(self, value: float) -> bool:
        return (value > self.low if self.open_low else value >= self.low) and value < self.high

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return low if self.high == float("inf") else f"{low} and less than {self.high:g}"


# NaN and infinity hold no bound, so a float that is listed here is finite too.
BOUNDS: dict[str, Bound] = {
    "seed": Bound(0, 2**63),
    "eval_every": Bound(0),
    "num": Bound(0),
    "max_batch_size": Bound(1),
    "max_new_tokens": Bound(1),
    "generation_temperature": Bound(0),
    "temperature": Bound(0),
    "top_p": Bound(0, 1.0000001),
    "model.projector_hidden": Bound(1),
    "lora.rank": Bound(1, 257),  # kernels/lora_linear.py: LARGEST_RANK, which would cost --help torch
    "lora.alpha": Bound(0, open_low=True),
    "lora.dropout": Bound(0, 1),
    "model.drop_path": Bound(0, 1),
    "adapter.dim": Bound(2),
    "adapter.scale": Bound(0, open_low=True),
    "adapter.temperature": Bound(0, open_low=True),
    "adapter.dropout": Bound(0, 1),
    "dataset.max_seq_len": Bound(16),
    "dataset.num_workers": Bound(0),
    "runtime.few_rows": Bound(0, 65),
    "optim.batch_size": Bound(1),
    "optim.accum_iter": Bound(1),
    "optim.epochs": Bound(1),
    "optim.lr": Bound(0, open_low=True),
    "optim.blr": Bound(0, open_low=True),
    "optim.min_lr": Bound(0),
    "optim.weight_decay": Bound(0),
    "optim.warmup_epochs": Bound(0),
    "optim.clip_grad": Bound(0, open_low=True),
    "optim.beta1": Bound(0, 1),
    "optim.beta2": Bound(0, 1),
    "optim.eps": Bound(0, open_low=True),
    "runtime.tokens_per_batch": Bound(128),
    "runtime.threads": Bound(0),
    "log.every": Bound(1),
    "log.save_every": Bound(0),
    "log.keep": Bound(1),
}

# What eval.py reads when it generates only, what the run says that it is given, and what it may say differently.
OF_GENERATION = (
    "max_batch_size", "max_new_tokens", "generation_temperature", "top_p", "legacy.decode_positions",
    "legacy.score_whole_text",
)  # fmt: skip
OF_A_RUN = ("model.", "adapter.", "dataset.", "legacy.")
BESIDE_A_RUN = ("dataset.root", "legacy.decode_positions", "legacy.score_whole_text", "legacy.eval_8bit_as_4bit")

Checked = TypeVar("Checked", Config, EvalConfig, ChatConfig)


def validate(config: Checked) -> Checked:
    """Return the configuration if it can run.

    Raises:
        UsageError: names the first flag that is out of range, or the combination that cannot work.
    """
    _check_bounds(config)
    _check_memory(config)
    if not isinstance(config, ChatConfig):
        _check_model(config)
    if isinstance(config, Config):
        _check_data(config)
        _check_training(config)
    elif isinstance(config, EvalConfig):
        _check_evaluation(config)
    return config


def effectless(config: Config | EvalConfig, base: Config | None = None) -> list[str]:
    """One sentence for each setting that differs from its default and changes nothing in this combination. `base`: the
    recipe, whose adapters may be of another kind than a flag asks for."""
    if isinstance(config, Config):
        notes = [*_effectless_training(config), *_effectless_adapters(config, Config() if base is None else base)]
    else:
        notes = list(_effectless_evaluation(config))
    if config.runtime.device == "cpu":
        notes += [
            f"--runtime.{name} has no effect with --runtime.device cpu" for name in about_unpacking(config.runtime)
        ]
    return notes


def about_unpacking(runtime: Runtime) -> list[str]:
    """The settings that differ from their default and matter where quantised weights are unpacked on a GPU."""
    asked = {
        "unpacked_memory": runtime.unpacked_memory != "auto" and parse_size(runtime.unpacked_memory) > 0,
        "few_rows": runtime.few_rows is not None,
        "prefetch": runtime.prefetch,
    }
    return [name for name, on in asked.items() if on]


def _check_bounds(config: Config | EvalConfig | ChatConfig) -> None:
    for path, bound in BOUNDS.items():
        try:
            value = get(config, path)
        except AttributeError:
            continue  # not every command has every flag
        if value is not None and not bound.holds(value):
            raise UsageError(f"{path} is {value}", where=f"--{path}", why=f"it must be {bound}")


def _check_memory(config: Config | EvalConfig | ChatConfig) -> None:
    texts = {"runtime.unpacked_memory": config.runtime.unpacked_memory}
    if isinstance(config, Config):
        texts["memory_budget"] = config.memory_budget
    for path, text in texts.items():
        if text == ("auto" if path == "runtime.unpacked_memory" else ""):
            continue
        try:
            size = parse_size(text)
        except ValueError as error:
            also = "it is auto, or " if path == "runtime.unpacked_memory" else ""
            raise UsageError(f"{path} is {text!r}", where=f"--{path}", why=f"{also}{error}") from error
        if path == "memory_budget" and not size:
            raise UsageError(
                f"{path} is {text!r}", where=f"--{path}", why="a run takes memory", do="say how much: 24GB"
            )


def _check_model(config: Config | EvalConfig) -> None:
    if config.model.delta and not config.model.language:
        raise UsageError("a delta without what it is added to", where="--model.delta", do="give --model.language")
    _check_projector(config)
    if config.adapter.dim % 2:
        raise UsageError(
            f"adapter.dim is {config.adapter.dim}", where="--adapter.dim", why="its two groups must be equally wide"
        )
    check_format(config.dataset.prompt_format)
    letters = config.dataset.options
    if len(letters) < 2 or len(set(letters)) != len(letters) or not (letters.isascii() and letters.isupper()):
        raise UsageError(
            f"dataset.options is {letters!r}", where="--dataset.options", do="give different capital letters: ABCDE"
        )


def _check_projector(config: Config | EvalConfig) -> None:
    model = config.model
    if model.projector not in ("auto", *KINDS) and not MLP.fullmatch(model.projector):
        raise UsageError(
            f"model.projector is {model.projector!r}", where="--model.projector",
            do=f"give auto, mlp2x_gelu (any number in place of the 2), {', '.join(KINDS[:-1])} or {KINDS[-1]}",
        )  # fmt: skip
    if model.projector != "lavin":
        return
    if model.projector_weights:
        raise UsageError(
            "model.projector_weights with the lavin projector", where="--model.projector_weights",
            why="LaVIN keeps its projector among its adapters", do="--adapter.init FILE.pth",
        )  # fmt: skip
    if model.select_layer is not None or model.select_feature != "auto":
        raise UsageError(
            "the lavin projector with a layer or a feature of the tower",
            where="--model.select_layer and --model.select_feature",
            why="it reads the class tokens of six layers", do="leave both out, or --model.projector mlp2x_gelu",
        )  # fmt: skip


def _check_data(config: Config) -> None:
    dataset = config.dataset
    if config.data and dataset.root:
        raise UsageError("two data sets to train on", where="--data and --dataset.root", do="give one of them")
    for flag in ("image_folder", "eval_data"):
        if get(config, flag) and not config.data:
            raise UsageError(f"{flag} without data", where=f"--{flag}", do="give the rows with --data FILE")
    if dataset.format in ("scienceqa", "chat") and not dataset.root:
        raise UsageError(
            f"dataset.format {dataset.format} without its folder", where="--dataset.root", do="--dataset.root FOLDER"
        )
    if dataset.format == "rows" and not config.data:
        raise UsageError("dataset.format rows without rows", where="--data", do="--data my.json")
    if config.log.evaluate != "none" and config.data:
        raise UsageError(
            f"log.evaluate {config.log.evaluate} with rows of your own",
            where="--log.evaluate",
            why="it scores ScienceQA's choices",
            do="--eval_data FILE for the validation loss",
        )
    own_rows = config.data or dataset.format == "chat"
    if config.eval_every and own_rows and not config.eval_data:
        raise UsageError(
            f"eval_every is {config.eval_every}, and there is nothing to evaluate on",
            where="--eval_every",
            do="--eval_data FILE" if config.data else "leave it out: the chat data have no evaluation split",
        )


def _check_training(config: Config) -> None:
    train = config.train
    if (train.language, train.vision, train.projector) == ("frozen", "frozen", "frozen"):
        raise UsageError("nothing trains", where="--train", do="leave one of language, vision and projector trainable")
    needed = [("bits", config.bits), ("bits_head", config.bits_head)] if train.language == "full" else []
    needed += [("bits_vision", config.bits_vision)] if train.vision == "full" else []
    for path, bits in needed:
        if bits != "16bit":
            part = "vision" if path == "bits_vision" else "language"
            raise UsageError(
                f"train.{part} full with {path} {bits}",
                where=f"--{path}",
                why="quantized weights cannot be trained",
                do=f"--{path} 16bit, or --train.{part} lora (or mma)",
            )
    for part in ("language", "vision"):
        if config.log.lavin_checkpoints and get(train, part) in ("full", "lora"):
            raise UsageError(
                f"log.lavin_checkpoints with train.{part} {get(train, part)}",
                where="--log.lavin_checkpoints",
                why="LaVIN's files hold adapters and the projector only",
                do="--log.no_lavin_checkpoints: the run's own checkpoints hold all that trains",
            )
    if config.optim.lr is not None and config.optim.min_lr > config.optim.lr:
        raise UsageError(
            f"optim.min_lr {config.optim.min_lr:g} is above optim.lr {config.optim.lr:g}", where="--optim.min_lr"
        )


def _check_evaluation(config: EvalConfig) -> None:
    if bool(config.run) == bool(config.adapter.init):
        what = "two sets of trained weights" if config.run else "nothing"
        raise UsageError(
            f"{what} to evaluate",
            where="--run and --adapter.init",
            do="give one: --run runs/NAME, or --adapter.init FILE.pth with --model.language and --dataset.root",
        )
    if config.model.language and not config.run and not config.dataset.root:
        raise UsageError("no benchmark data", where="--dataset.root", do="--dataset.root FOLDER with problems.json")


def _effectless_training(config: Config) -> Iterator[str]:
    adapter, train, dataset, optim = config.adapter, config.train, config.dataset, config.optim
    vision = trained_vision(config)
    if config.eval_every and not config.eval_data:
        yield "--eval_every has no effect without --eval_data"
    if config.json and not config.plan:
        yield "--json has no effect without --plan"
    if config.dry_run and config.plan:
        yield "--dry_run has no effect with --plan, which ends before the first step"
    if config.memory_budget and config.gradient_checkpointing:
        yield "--memory_budget has no effect with --gradient_checkpointing, which takes the least memory anyway"
    if config.bits == "16bit":
        for name in about_unpacking(config.runtime):
            yield f"--runtime.{name} has no effect with --bits 16bit: nothing has to be unpacked"
    if config.resume and adapter.init:
        yield "--adapter.init has no effect with --resume, which brings its own adapter weights"
    if optim.lr is not None and optim.blr != Optim().blr:
        yield f"--optim.blr {optim.blr:g} has no effect: --optim.lr {optim.lr:g} is the peak itself"
    if optim.warmup_epochs >= optim.epochs:
        yield f"warm-up lasts {optim.warmup_epochs:g} of {optim.epochs} epochs: the peak learning rate is never reached"
    if train.language != "mma" and adapter.language != "attn":
        yield f"--adapter.language {adapter.language} has no effect with --train.language {train.language}"
    if vision != "mma" and adapter.vision != "router":
        yield f"--adapter.vision {adapter.vision} has no effect with --train.vision {vision}"
    scienceqa = dataset.format == "scienceqa" or (dataset.format == "auto" and not config.data)
    for name, changed in (
        ("use_caption", dataset.use_caption),
        ("prompt_format", dataset.prompt_format != "QCM-ALE"),
        ("split", dataset.split != "train"),
        ("eval_split", dataset.eval_split != "test"),
    ):
        if changed and not scienceqa:
            yield f"--dataset.{name} has no effect: the data are not ScienceQA's"
    if dataset.captions and not dataset.use_caption:
        yield "--dataset.captions has no effect without --dataset.use_caption"
    with_mma = "--train.vision mma"
    for switch, works, needs in (
        ("clip_router", vision == "mma", with_mma),
        ("normal_adapter", vision == "mma", with_mma),
        ("normal_adapter", vision != "mma" or adapter.vision == "normal", "--adapter.vision normal"),
        ("vicuna_permutation", bool(config.model.delta), "--model.delta"),
        ("block_routing", train.language == "mma", "--train.language mma"),
        ("block_routing", train.language != "mma" or adapter.language == "block", "--adapter.language block"),
        ("eval_8bit_as_4bit", config.bits == "8bit", "--bits 8bit"),
        ("chat_length", dataset.format == "chat", "--dataset.format chat"),
    ):
        if get(config.legacy, switch) and not works:
            yield f"--legacy.{switch} has no effect without {needs}"


def _effectless_adapters(config: Config, base: Config) -> Iterator[str]:
    """LoRA's settings where nothing has a LoRA, MMA's where nothing has an MMA adapter."""
    trained = (config.train.language, trained_vision(config))
    for kind, paths in (
        ("lora", ("lora.rank", "lora.alpha", "lora.dropout", "lora.targets")),
        ("mma", ("adapter.dim", "adapter.scale", "adapter.temperature", "adapter.dropout")),
    ):
        for path in paths:
            if kind not in trained and get(config, path) != get(base, path):
                yield f"--{path} has no effect: neither --train.language nor --train.vision is {kind}"
    if config.lora.targets and config.train.language != "lora" and config.train.vision == "lora":
        yield "--lora.targets has no effect without --train.language lora: in a tower all linears have LoRA"
    if config.model.projector_hidden != Model().projector_hidden and config.model.projector not in ("auto", "lavin"):
        yield f"--model.projector_hidden has no effect with --model.projector {config.model.projector}"


def _effectless_evaluation(config: EvalConfig) -> Iterator[str]:
    changed = [path for path in leaves(EvalConfig) if get(config, path) != get(EvalConfig(), path)]
    for path in changed:
        if path in OF_GENERATION and not config.generate:
            yield f"--{path} has no effect without --generate"
        elif config.run and (path == "bits" or path.startswith(OF_A_RUN)) and path not in BESIDE_A_RUN:
            yield f"--{path} has no effect with --run, whose config.yaml says it"
    if config.legacy.eval_8bit_as_4bit and not config.run and config.bits != "8bit":
        yield "--legacy.eval_8bit_as_4bit has no effect without --bits 8bit"
