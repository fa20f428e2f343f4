"""The tree itself, its YAML form and the checks across its fields."""

from __future__ import annotations

from pathlib import Path

import pytest
import tyro

from engine.checks import BOUNDS, validate
from engine.config import ChatConfig, Config, EvalConfig, Optim, get, leaves, run_directory, trained_vision
from engine.config_file import from_yaml, to_yaml
from engine.errors import UsageError
from engine.flags import parse_eval, parse_train
from kernels.lora_linear import LARGEST_RANK
from models.projectors.config import KINDS


def test_what_the_checks_accept_is_what_there_is() -> None:
    for kind in (*KINDS, "mlp3x_gelu", "auto"):
        config = Config()
        config.model.projector = kind
        validate(config)
    assert BOUNDS["lora.rank"].high == LARGEST_RANK + 1


@pytest.mark.parametrize("tree", [Config, EvalConfig, ChatConfig])
def test_every_field_has_help_text(tree: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(tree, args=["--help"], use_underscores=True)
    printed = capsys.readouterr().out.replace("│", " ")
    words = " ".join(printed.split())
    for path in leaves(tree):
        after = words.partition(f"--{path}")[2].partition("(default:")[0]
        assert any(character in after for character in ".:"), f"--{path} has no help text"


def test_yaml_of_a_run_is_read_back(tmp_path: Path) -> None:
    line = "--bits 8bit --data it's:#here.json --seed 3 --optim.lr 1e-7 --adapter.vision router_block --plan"
    config, _ = parse_train(line.split())
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config


def test_yaml_may_leave_out_what_it_does_not_change(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert from_yaml(tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim: {lrr: 1}", ("unknown key 'optim.lrr'", "did you mean optim.lr?")),
        ("lr: 1", ("unknown key 'lr'", "did you mean optim.lr?")),
        ("bits: 5bit", ("bits", "4bit")),
        ("optim: {epochs: many}", ("optim.epochs", "Integer")),
        ("optim: 3", ("Optim",)),
        ("data: ${oc.env:HOME}", ("data is '${oc.env:HOME}'",)),
        ("data: ???", ("data is '???'",)),
        ("- a", ("holds a list",)),
        ("a: b: c", ("no YAML file",)),
        ("model: !!python/object/apply:os.getcwd []", ("no YAML file",)),
    ],
)
def test_wrong_yaml_is_an_error_that_names_the_key(text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        from_yaml(path)
    for part in (*parts, "wrong.yaml"):
        assert part in str(caught.value)


def test_missing_recipe_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"cannot read 'nowhere\.yaml'"):
        parse_train(["--recipe", "nowhere.yaml"])


def test_every_bound_belongs_to_a_flag() -> None:
    flags = leaves(Config) | leaves(EvalConfig) | leaves(ChatConfig)
    assert BOUNDS.keys() <= flags.keys()


@pytest.mark.parametrize("path", sorted(BOUNDS.keys() & leaves(Config).keys()))
def test_out_of_range_is_an_error_that_names_the_flag(path: str) -> None:
    with pytest.raises(UsageError, match=path.replace(".", r"\.")):
        parse_train([f"--{path}", "-1"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--train.language full", "train.language full with bits 4bit"),
        ("--train.language full --bits 16bit --bits_head 4bit", "bits_head 4bit"),
        ("--train.vision full --bits_vision 4bit", "bits_vision 4bit"),
        ("--train.language frozen --train.vision frozen --train.projector frozen", "nothing trains"),
        ("--optim.epochs 0", "optim.epochs is 0"),
        ("--optim.lr nan", "optim.lr is nan"),
        ("--optim.lr inf", "optim.lr is inf"),
        ("--optim.lr 1e-4 --optim.min_lr 1e-3", "optim.min_lr 0.001 is above optim.lr 0.0001"),
        ("--adapter.dim 7", "adapter.dim is 7"),
        ("--image_folder p", "image_folder without data"),
        ("--eval_data x.json", "eval_data without data"),
        ("--data x.json --dataset.root d", "two data sets"),
        ("--data x.json --eval_every 5", "nothing to evaluate on"),
        ("--dataset.format chat --dataset.root d --eval_every 5", "nothing to evaluate on"),
        ("--dataset.format scienceqa", "dataset.format scienceqa without its folder"),
        ("--dataset.format rows", "dataset.format rows without rows"),
        ("--dataset.prompt_format QQQ", "'QQQ'"),
        ("--dataset.options AAB", "dataset.options is 'AAB'"),
        ("--model.delta d", "a delta without what it is added to"),
        ("--runtime.unpacked_memory 4", "runtime.unpacked_memory is '4'"),
        ("--runtime.few_rows 65", "runtime.few_rows is 65"),
        ("--memory_budget 24", "memory_budget is '24'"),
        ("--memory_budget 0", "memory_budget is '0'"),
        ("--memory_budget auto", "memory_budget is 'auto'"),
        ("--train.language lora --lora.rank 257", "lora.rank is 257"),
        ("--model.projector mlp0x_gelu", "model.projector is 'mlp0x_gelu'"),
        ("--model.projector lavin --model.select_layer -2", "lavin projector with a layer"),
        ("--model.projector lavin --model.projector_weights p.bin", "projector_weights with the lavin projector"),
        ("--train.language lora --log.lavin_checkpoints", "log.lavin_checkpoints with train.language lora"),
    ],
)
def test_what_cannot_work_is_an_error(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_train(line.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "--train.language full --bits 16bit",
        "--train.vision full",
        "--data x.json --eval_every 5 --eval_data y.json",
        "--eval_every 5",
        "--dataset.root d --eval_every 5",
        "--model.language W/7B",
        "--optim.epochs 1",
    ],
)
def test_what_can_work_is_accepted(line: str) -> None:
    parse_train(line.split())


def test_an_evaluation_needs_exactly_one_thing_to_evaluate() -> None:
    for line, message in (
        ("", "nothing to evaluate"),
        ("--run r --adapter.init a.pth", "two sets of trained weights"),
        ("--adapter.init a.pth --model.language W/7B", "no benchmark data"),
        ("--run r --top_p 1.5", "top_p is 1.5"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_eval(line.split())
    parse_eval(["--adapter.init", "a.pth", "--model.language", "W/7B", "--dataset.root", "d"])


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("--json", "--json has no effect without --plan"),
        ("--plan --dry_run", "--dry_run has no effect with --plan"),
        ("--resume auto --adapter.init a.pth", "--adapter.init has no effect with --resume"),
        ("--optim.lr 1e-3 --optim.blr 1e-2", "--optim.blr 0.01 has no effect"),
        ("--data r.json --optim.epochs 2", "the peak learning rate is never reached"),
        ("--train.vision frozen --adapter.vision router_block", "--adapter.vision router_block has no effect"),
        ("--train.language frozen --adapter.language block", "--adapter.language block has no effect"),
        ("--data x.json --dataset.use_caption", "--dataset.use_caption has no effect"),
        ("--dataset.root d --dataset.captions c.json", "--dataset.captions has no effect without"),
        ("--legacy.normal_adapter", "--legacy.normal_adapter has no effect without --adapter.vision normal"),
        ("--legacy.vicuna_permutation", "--legacy.vicuna_permutation has no effect without --model.delta"),
        ("--legacy.block_routing", "--legacy.block_routing has no effect without --adapter.language block"),
        ("--legacy.eval_8bit_as_4bit", "--legacy.eval_8bit_as_4bit has no effect without --bits 8bit"),
        ("--legacy.chat_length", "--legacy.chat_length has no effect without --dataset.format chat"),
        ("--memory_budget 1GB --gradient_checkpointing", "--memory_budget has no effect with --gradient_checkpointing"),
        ("--bits 16bit --runtime.unpacked_memory 4GB", "--runtime.unpacked_memory has no effect with --bits 16bit"),
        ("--runtime.device cpu --runtime.unpacked_memory 1MB", "no effect with --runtime.device cpu"),
        ("--runtime.device cpu --runtime.few_rows 0", "--runtime.few_rows has no effect with --runtime.device cpu"),
        ("--runtime.device cpu --runtime.prefetch", "--runtime.prefetch has no effect with --runtime.device cpu"),
        ("--lora.rank 8", "--lora.rank has no effect: neither --train.language nor --train.vision is lora"),
        ("--train.vision lora --lora.targets q_proj", "--lora.targets has no effect without --train.language lora"),
        ("--data x.json --train.language lora --adapter.dim 4", "--adapter.dim has no effect: neither"),
        ("--data x.json --train.language lora --adapter.vision normal", "has no effect with --train.vision frozen"),
        (
            "--data x.json --train.language lora --train.vision frozen --legacy.block_routing",
            "without --train.language",
        ),
        ("--train.vision frozen --legacy.clip_router", "--legacy.clip_router has no effect without --train.vision mma"),
        ("--model.projector linear --model.projector_hidden 9", "--model.projector_hidden has no effect with"),
    ],
)
def test_a_flag_without_effect_warns(line: str, note: str) -> None:
    _, notes = parse_train(line.split())
    assert [note in text for text in notes] == [True]


@pytest.mark.parametrize(
    ("line", "notes"),
    [
        ("--run r --top_p 0.5", ["--top_p has no effect without --generate"]),
        ("--run r --generate --top_p 0.5 --dataset.root d --legacy.score_whole_text", []),
        ("--run r --adapter.dim 4 --bits 8bit", ["--bits has no effect with --run", "--adapter.dim has no effect"]),
        ("--adapter.init a.pth --adapter.dim 4 --bits 8bit --legacy.eval_8bit_as_4bit", []),
        ("--adapter.init a.pth --legacy.eval_8bit_as_4bit", ["--legacy.eval_8bit_as_4bit has no effect without"]),
    ],
)
def test_a_flag_without_effect_on_an_evaluation_warns(line: str, notes: list[str]) -> None:
    _, got = parse_eval(line.split())
    assert [text[: len(start)] for text, start in zip(got, notes, strict=True)] == notes


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--train.language lora --lora.rank 8",
        "--runtime.unpacked_memory 4GB",
        "--optim.lr 1e-3",
        "--dataset.split minitrain",
        "--bits 8bit --plan --json",
    ],
)
def test_flags_with_effect_do_not_warn(line: str) -> None:
    assert parse_train(line.split())[1] == []


@pytest.mark.parametrize(
    ("line", "vision"),
    [("", "mma"), ("--train.language lora", "frozen"), ("--train.language frozen", "mma"),
     ("--train.language lora --train.vision mma", "mma"), ("--train.language lora --train.vision lora", "lora")],
)  # fmt: skip
def test_what_trains_in_the_tower(line: str, vision: str) -> None:
    assert trained_vision(parse_train(line.split())[0]) == vision


def test_peak_learning_rate_is_per_256_samples() -> None:
    optim = Optim(batch_size=4, accum_iter=4, blr=9e-3)
    assert optim.samples_per_step(2) == 32
    assert optim.peak_lr(2) == pytest.approx(1.125e-3, rel=1e-12)
    assert Optim(lr=1e-4).peak_lr(8) == 1e-4


@pytest.mark.parametrize(
    ("line", "directory"),
    [
        ("", "runs/demo"),
        ("--data rows/cats.v2.json", "runs/cats.v2"),
        ("--dataset.root data/sqa/", "runs/sqa"),
        ("--output_dir here --data x.json", "here"),
    ],
)
def test_run_directory_is_named_after_what_is_trained(line: str, directory: str) -> None:
    assert run_directory(parse_train(line.split())[0]) == Path(directory)


def test_get_follows_a_path() -> None:
    assert get(Config(), "optim.beta2") == 0.95
    assert validate(Config()) == Config()
