"""Command lines: canonical flags, switches, recipes and the messages for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import ChatConfig, Config, EvalConfig, leaves
from engine.config_file import from_yaml
from engine.errors import UsageError
from engine.export.config import ExportConfig
from engine.flags import DEMO, FILES, parse_chat, parse_eval, parse_train
from engine.suggest import closest

FROZEN = Path(__file__).with_name("flags.json")


def test_the_flags_are_the_reviewed_ones() -> None:
    """A new flag, or one less, is a decision: change flags.json with it, and say so in CHANGELOG.md."""
    trees = {"train.py": Config, "eval.py": EvalConfig, "chat.py": ChatConfig, "export.py": ExportConfig}
    assert {command: list(leaves(tree)) for command, tree in trees.items()} == json.loads(FROZEN.read_text())


def test_without_flags_the_demo_runs() -> None:
    config, notes = parse_train([])
    assert config == from_yaml(DEMO) and notes == []


def test_naming_something_to_train_on_leaves_the_demo() -> None:
    config, _ = parse_train(["--data", "rows.json"])
    assert config == Config(data="rows.json")


def test_hyphens_and_underscores_are_the_same() -> None:
    for line in ("--optim.batch_size 4 --image_folder p", "--optim.batch-size=4 --image-folder=p"):
        config, _ = parse_train(["--data", "x.json", *line.split()])
        assert (config.optim.batch_size, config.image_folder) == (4, "p")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("--gradient_checkpointing", True),
        ("--gradient-checkpointing=True", True),
        ("--gradient_checkpointing false", False),
        ("--gradient_checkpointing --no-gradient_checkpointing", False),
        ("--no-gradient-checkpointing=False", True),
    ],
)
def test_switches(line: str, value: bool) -> None:
    assert parse_train(line.split())[0].gradient_checkpointing is value


def test_nested_switch_can_be_negated() -> None:
    assert not parse_train(["--legacy.clip_router", "--legacy.no-clip-router"])[0].legacy.clip_router


def test_the_last_of_two_counts_and_none_is_a_value() -> None:
    assert parse_train(["--seed", "1", "--seed", "2"])[0].seed == 2
    assert parse_train(["--optim.lr", "1e-3", "--optim.lr", "None"])[0].optim.lr is None


def test_values_keep_their_text() -> None:
    assert parse_train(["--output_dir", "a b=c"])[0].output_dir == "a b=c"
    assert parse_train(["--output_dir="])[0].output_dir == ""


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--optim.lrr 1", ("unknown flag --optim.lrr", "did you mean --optim.lr?")),
        ("--lr 1e-3", ("unknown flag --lr", "LaVIN", "did you mean --optim.lr?")),
        ("--batch-size 1", ("unknown flag --batch-size", "did you mean --optim.batch_size?")),
        ("--lerning_rate 1", ("unknown flag --lerning_rate", "did you mean --optim.lr?")),
        ("--imge_folder p", ("did you mean --image_folder?",)),
        ("--zzzzzz 1", ("unknown flag --zzzzzz", "--help")),
        ("--bit_head 4bit", ("unknown flag --bit_head", "did you mean --bits_head?")),
        ("--llama_model_path w --bit_vision 8bit", ("did you mean --bits_vision?",)),
        ("--bits 5bit", ("--bits is '5bit'", "4bit", "8bit", "16bit")),
        ("--optim.epochs many", ("--optim.epochs is 'many'", "Integer")),
        ("--optim.lr fast", ("--optim.lr is 'fast'", "Float")),
        ("--plan=maybe", ("--plan is 'maybe'", "switch")),
        ("--seed 1 2", ("--seed has 2 values: 1 2",)),
        ("--data", ("--data has no value",)),
        ("my.json", ("unexpected 'my.json'",)),
        ("--data ${oc.env:HOME}", ("${oc.env:HOME}",)),
        ("--no-bits", ("unknown flag --no-bits",)),
    ],
)
def test_what_is_wrong_is_said(line: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_train(line.split())
    for part in parts:
        assert part in str(caught.value)


def test_recipe_is_read_first_and_flags_override_it(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("bits: 8bit\noptim: {epochs: 3, lr: 1e-4}\n")
    config, _ = parse_train(["--optim.epochs", "5", "--recipe", str(recipe)])
    assert (config.bits, config.optim.epochs, config.optim.lr) == ("8bit", 5, 1e-4)
    assert config.recipe == str(recipe)


def test_own_rows_take_the_place_of_a_recipe_s_data(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("dataset: {root: ../data, format: scienceqa, max_seq_len: 256}\n")
    config, _ = parse_train(["--recipe", str(recipe), "--data", "my.json"])
    assert (config.dataset.root, config.dataset.format, config.dataset.max_seq_len) == ("", "auto", 256)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no shell replaces it: behind =, and in a recipe."""
    monkeypatch.setenv("HOME", "/home/me")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {language: ~/weights/7B, vision: /v/~tower}\n")
    config, _ = parse_train(["--recipe", str(recipe), "--data=~/my.json", "--image_folder", "~"])
    assert (config.data, config.image_folder) == ("/home/me/my.json", "/home/me")
    assert (config.model.language, config.model.vision) == ("/home/me/weights/7B", "/v/~tower")
    assert parse_eval(["--run=~/runs/demo"])[0].run == "/home/me/runs/demo"
    with pytest.raises(UsageError, match=r"/home/me/none\.yaml"):
        parse_train(["--recipe=~/none.yaml"])
    with pytest.raises(UsageError, match=r"data is '~nobody-of-this-name/my\.json'"):
        parse_train(["--data=~nobody-of-this-name/my.json"])


@pytest.mark.parametrize("tree", [Config, EvalConfig, ChatConfig])
def test_every_leaf_that_names_a_file_is_known_as_one(tree: type) -> None:
    texts = {path for path, kind in leaves(tree).items() if kind is str}
    others = {
        "recipe",
        "split",
        "question",
        "dataset.split",
        "dataset.eval_split",
        "dataset.prompt_format",
        "dataset.options",
        "runtime.unpacked_memory",
        "memory_budget",
        "dataset.anyres_grids",
        "model.projector",
        "model.s2",
        "lora.targets",
    }
    assert texts - FILES == texts & others


def test_warnings_come_with_the_configuration() -> None:
    _, notes = parse_train(["--json"])
    assert notes == ["--json has no effect without --plan"]


def test_eval_and_chat_have_their_own_trees() -> None:
    config, notes = parse_eval(["--run", "runs/demo", "--num", "10", "--generate"])
    assert (config.run, config.num, config.generate, config.split, notes) == ("runs/demo", 10, True, "test", [])
    chat = parse_chat(["--run", "runs/x", "--image", "cat.jpg", "--question", "What is it?"])
    assert (chat.run, chat.image, chat.question) == ("runs/x", "cat.jpg", "What is it?")
    with pytest.raises(UsageError, match="unknown flag --optim"):
        parse_chat(["--optim.lr", "1"])


@pytest.mark.parametrize("parser", ["parse_train", "parse_eval", "parse_chat"])
def test_help_lists_the_flags_without_torch(parser: str) -> None:
    script = f"""
import sys
from engine import flags
try:
    flags.{parser}(["--help"])
except SystemExit as stopped:
    assert stopped.code == 0
    sys.exit(70 if {{"torch", "numpy", "triton", "PIL"}} & sys.modules.keys() else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("--runtime.device", "(default: auto)"):
        assert expected in done.stdout


@pytest.mark.parametrize("tree", [Config, EvalConfig, ChatConfig])
def test_misspelt_flags_find_the_one_that_was_meant(tree: type) -> None:
    """Each flag with a letter too many, one too few at its end or start, and without its underscores."""
    known = leaves(tree)
    for path in known:
        group, dot, last = path.rpartition(".")
        misspelt = {path + path[-1], path[:-1], group + dot + last[1:], path.replace("_", "")} - known.keys()
        misspelt.discard("optim.beta")  # as near to beta1 as to beta2
        assert {wrong: closest(wrong, known) for wrong in misspelt} == dict.fromkeys(misspelt, path)
