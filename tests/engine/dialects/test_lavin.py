"""LaVIN's command lines give what LaVIN's scripts document, and our recipes give the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.checks import effectless
from engine.config import Config, get, leaves, run_directory
from engine.config_file import from_yaml
from engine.dialects import lavin
from engine.errors import UsageError
from engine.flags import parse_eval, parse_train

RECIPES = Path(__file__).parents[3] / "recipes"

# Flags that all training scripts of LaVIN pass.
COMMON = (
    "--llama_model_path ../data/weights/ --data_path ../data/alpaca_data.json --max_seq_len 512 --blr 9e-3 "
    "--weight_decay 0.02 --adapter_type attn --adapter_dim 8 --adapter_scale 1 --n_prompt 6 --prompt_format QCM-ALE "
    "--visual_adapter_type router"
)
LITE = "--gradient_checkpointing --bits 4bit --cpu_load"


@dataclass(frozen=True)
class Script:
    """A script's own flags, its GPUs, and the recipe of ours that is the same run."""

    recipe: str
    flags: str
    num_gpus: int

    @property
    def argv(self) -> list[str]:
        return f"{COMMON} {self.flags}".split()


SCRIPTS = {
    "finetuning_sqa_7b.sh": Script(
        "lavin-7b",
        "--llm_model 7B --batch_size 4 --accum_iter 4 --epochs 20 --warmup_epochs 2 --temperature 10. "
        "--output_dir ./LaVIN-7B/",
        2,
    ),
    "finetuning_sqa_7b_lite.sh": Script(
        "lavin-7b-lite",
        "--llm_model 7B --batch_size 1 --accum_iter 32 --epochs 20 --warmup_epochs 2 --temperature 10. "
        f"--output_dir ./LaVIN-7B-lite/ {LITE}",
        1,
    ),
    "finetuning_sqa_13b.sh": Script(
        "lavin-13b",
        "--llm_model 13B --batch_size 4 --accum_iter 1 --epochs 20 --warmup_epochs 2 --temperature 5. "
        "--output_dir ./LaVIN-13B/",
        8,
    ),
    "finetuning_sqa_13b_lite.sh": Script(
        "lavin-13b-lite",
        "--llm_model 13B --batch_size 1 --accum_iter 32 --epochs 20 --warmup_epochs 2 --temperature 5. "
        f"--output_dir ./LaVIN-13B-lite/ {LITE}",
        1,
    ),
    "finetuning_sqa_vicuna_7b.sh": Script(
        "lavin-vicuna-7b",
        "--llm_model 7B --use_vicuna --batch_size 4 --accum_iter 4 --epochs 20 --warmup_epochs 2 --temperature 10. "
        "--output_dir ./LaVIN-Vicuna-7B/",
        2,
    ),
    "finetuning_sqa_vicuna_13b.sh": Script(
        "lavin-vicuna-13b",
        "--llm_model 13B --use_vicuna --batch_size 4 --accum_iter 1 --epochs 20 --warmup_epochs 2 --temperature 5. "
        "--output_dir ./LaVIN-Vicuna-13B/",
        8,
    ),
    "vl_instruction_tuning_13b.sh": Script(
        "lavin-13b-chat",
        "--llm_model 13B --batch_size 4 --accum_iter 1 --epochs 15 --warmup_epochs 0.2 --temperature 5. "
        "--output_dir ./LaVIN-13B-VLIT/ --do_pretrain",
        8,
    ),
    "vl_instruction_tuning_vicuna_13b.sh": Script(
        "lavin-vicuna-13b-chat",
        "--llm_model 13B --use_vicuna --batch_size 4 --accum_iter 1 --epochs 15 --warmup_epochs 0.2 --temperature 5. "
        "--output_dir ./LaVIN-13B-VLIT/ --do_pretrain",
        8,
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_parses_to_the_documented_values(name: str) -> None:
    script = SCRIPTS[name]
    config, notes = parse_train(script.argv)
    size = "13B" if "13b" in name else "7B"
    assert config.model.language == f"../data/weights/{size}"
    assert config.model.tokenizer == "../data/weights/tokenizer.model"
    assert config.model.delta == (f"../data/weights/vicuna_{size}" if "vicuna" in name else "")
    assert config.optim.samples_per_step(script.num_gpus) == 32
    assert config.optim.peak_lr(script.num_gpus) == pytest.approx(1.125e-3, rel=1e-12)
    chat = name.startswith("vl_")
    assert (config.optim.epochs, config.optim.warmup_epochs) == ((15, 0.2) if chat else (20, 2.0))
    assert config.optim.weight_decay == 0.02
    assert (config.optim.min_lr, config.optim.clip_grad, config.seed) == (0.0, None, 0)
    assert config.optim.reduction == "micro_batch"
    assert config.adapter.temperature == (5.0 if size == "13B" else 10.0)
    assert (config.adapter.dim, config.adapter.scale) == (8, 1.0)
    assert (config.adapter.language, config.adapter.vision) == ("attn", "router")
    assert (config.model.projector_hidden, config.model.drop_path) == (128, 0.0)
    assert (config.dataset.root, config.dataset.max_seq_len) == ("../data", 512)
    assert (config.dataset.format, config.dataset.prompt_format) == ("chat" if chat else "scienceqa", "QCM-ALE")
    lite = name.endswith("_lite.sh")
    assert (config.bits, config.gradient_checkpointing) == ("4bit" if lite else "16bit", lite)
    assert config.log.lavin_checkpoints
    assert run_directory(config).name.startswith("LaVIN")
    idle = ["--data_path", *(["--cpu_load"] if lite else [])]
    assert [note.split()[0] for note in notes] == idle


@pytest.mark.parametrize("name", SCRIPTS)
def test_recipe_is_the_same_run_as_the_script(name: str) -> None:
    """All but the run directory, which a recipe names after itself, and the recomputation of all layers, which changes
    no number: recipes leave it to the memory that is there."""
    script = SCRIPTS[name]
    config, _ = parse_train(script.argv)
    recipe, notes = parse_train(["--recipe", str(RECIPES / f"{script.recipe}.yaml")])
    assert run_directory(recipe) == Path("runs") / script.recipe
    config.output_dir, config.recipe = recipe.output_dir, recipe.recipe
    assert not recipe.gradient_checkpointing
    config.gradient_checkpointing = False
    assert recipe == config
    assert notes == []


def test_every_recipe_loads_and_says_what_it_needs() -> None:
    recipes = sorted(RECIPES.glob("*.yaml"))
    assert {path.stem for path in recipes} == {script.recipe for script in SCRIPTS.values()}
    for path in recipes:
        assert effectless(from_yaml(path)) == []
        head = path.read_text().partition("\nbits:")[0]
        for part in ("# Memory:", "# Disk:", "# Hours:", "# Expect:", "# Launch:", f"--recipe recipes/{path.name}"):
            assert part in head, f"{path.name}: {part}"


def test_defaults_are_lavin_s_without_a_recipe() -> None:
    config, notes = parse_train(["--llm_model", "7B"])
    expected = {
        "bits": "16bit",
        "output_dir": "./output_dir",
        "model.language": "llama/7B",
        "model.tokenizer": "llama/tokenizer.model",
        "adapter.vision": "normal",
        "adapter.temperature": 10.0,
        "dataset.format": "scienceqa",
        "dataset.root": "../data",
        "dataset.max_seq_len": 512,
        "dataset.prompt_format": "CQM-A",
        "dataset.num_workers": 10,
        "optim.batch_size": 64,
        "optim.epochs": 400,
        "optim.blr": 1e-3,
        "optim.weight_decay": 0.05,
        "optim.warmup_epochs": 40.0,
        "optim.reduction": "micro_batch",
        "log.lavin_checkpoints": True,
    }
    changed = {path: get(config, path) for path in leaves(Config) if get(config, path) != get(Config(), path)}
    assert changed == expected
    assert len(notes) == 1
    assert "no router" in notes[0]


def test_with_a_recipe_only_given_flags_are_translated(tmp_path: Path) -> None:
    """The line of DESIGN: the recipe's model and data, found in other folders."""
    path = str(RECIPES / "lavin-vicuna-7b.yaml")
    config, notes = parse_train(["--recipe", path, "--llama_model_path", "W/", "--data_root", "D/", "--epochs", "3"])
    recipe = from_yaml(path)
    moved = {
        "model.language": "W/7B",
        "model.tokenizer": "W/tokenizer.model",
        "model.delta": "D/weights/vicuna_7B",
        "dataset.root": "D/",
        "optim.epochs": 3,
        "recipe": path,
    }
    assert {p: get(config, p) for p in leaves(Config) if get(config, p) != get(recipe, p)} == moved
    assert notes == []


def test_canonical_flags_may_be_mixed_in_and_win() -> None:
    line = f"{COMMON} --llm_model 7B --epochs 20 --optim.epochs 3 --legacy.clip_router --model.delta mine --use_vicuna"
    config, _ = parse_train(line.split())
    assert (config.optim.epochs, config.legacy.clip_router, config.model.delta) == (3, True, "mine")


def test_own_rows_on_lavin_s_weights() -> None:
    config, _ = parse_train(f"{COMMON} --llm_model 7B --data my.json --image_folder p".split())
    assert (config.data, config.dataset.root, config.dataset.format) == ("my.json", "", "auto")


def test_fire_style_and_other_spellings() -> None:
    line = f"{COMMON} --llm_model=13B --use_vicuna=True --bits=16bits --options ABCD --device cuda:0 --data-root=/d"
    config, _ = parse_train(line.split())
    assert config.model.delta == "/d/weights/vicuna_13B"
    assert (config.bits, config.dataset.options, config.runtime.device) == ("16bit", "ABCD", "cuda")
    assert parse_train(f"{COMMON} --use_vicuna=False".split())[0].model.delta == ""
    listed = parse_train([*COMMON.split(), "--options", '["A", "B", "C"]'])[0]
    assert listed.dataset.options == "ABC"


@pytest.mark.parametrize(
    ("line", "notes"),
    [
        ("--n_prompt 10", ["--n_prompt 10 has no effect"]),
        ("--n_prompt 6", []),
        ("--visual_adapter_type normal", ["--visual_adapter_type normal"]),
        ("--pin_mem --no_pin_mem", ["--pin_mem has no effect", "--no_pin_mem has no effect"]),
        ("--world_size 1 --local-rank -1", ["--world_size has no effect", "--local-rank has no effect"]),
        ("--log_dir x --log_dir y", ["--log_dir has no effect"]),
        ("--resume old/checkpoint-3.pth", ["--resume old/checkpoint-3.pth brings adapter weights only"]),
    ],
)
def test_flags_without_effect_warn_once(line: str, notes: list[str]) -> None:
    silent = COMMON.replace("--data_path ../data/alpaca_data.json ", "")
    _, got = parse_train([*silent.split(), *["--epochs", "50"], *line.split()])
    assert [text[: len(start)] for text, start in zip(got, notes, strict=True)] == notes


def test_resume_of_a_lavin_file_starts_from_its_adapters() -> None:
    config, _ = parse_train(f"{COMMON} --resume out/checkpoint-3.pth".split())
    assert (config.adapter.init, config.resume) == ("out/checkpoint-3.pth", "")
    config, _ = parse_train(f"{COMMON} --resume auto".split())
    assert (config.adapter.init, config.resume) == ("", "auto")
    with pytest.raises(UsageError, match="nothing is downloaded"):
        parse_train(f"{COMMON} --resume https://example.org/a.pth".split())


def test_misspelt_flag_is_compared_with_lavin_s_too() -> None:
    with pytest.raises(UsageError, match=r"did you mean --llama_model_path\?"):
        parse_train(["--llm_model", "7B", "--lama_model_path", "W"])


def test_wrong_value_is_named_as_it_was_typed() -> None:
    with pytest.raises(UsageError, match="--epochs is 'many'"):
        parse_train(["--llm_model", "7B", "--epochs", "many"])


def test_every_flag_leads_to_a_leaf_or_says_why_not() -> None:
    paths = leaves(Config)
    for name, known in lavin.TRAIN.items():
        assert known.to in paths or known.nothing or known is lavin.RULE, name
        assert not (known.to and known.nothing), name


EVAL_7B_LITE = (
    "--ckpt_dir ../data/weights/ --llm_model 7B --tokenizer_path ../data/weights/tokenizer.model --data_root ../data "
    "--caption_file ../data/captions.json --adapter_path ./LaVIN-7B-lite/checkpoint-19.pth --adapter_type attn "
    "--adapter_dim 8 --adapter_scale 1 --prompt_format QCM-ALE --max_batch_size 64 --max_seq_len 512 --split test "
    "--n_prompt 6 --temperature 10. --visual_adapter_type router --bits 4bit --cpu_load"
)


def test_evaluation_line_of_the_lite_script() -> None:
    config, notes = parse_eval(EVAL_7B_LITE.split())
    assert config.adapter.init == "./LaVIN-7B-lite/checkpoint-19.pth"
    assert (config.model.language, config.model.tokenizer) == ("../data/weights/7B", "../data/weights/tokenizer.model")
    assert (config.split, config.bits, config.max_batch_size, config.generate) == ("test", "4bit", 64, False)
    assert (config.generation_temperature, config.top_p, config.max_new_tokens) == (0.1, 0.75, 64)
    assert (config.adapter.temperature, config.adapter.vision, config.adapter.language) == (10.0, "router", "attn")
    assert (config.dataset.root, config.dataset.captions) == ("../data", "../data/captions.json")
    assert [note.split()[0] for note in notes] == ["--tokenizer_path", "--cpu_load", "--max_batch_size"]


def test_evaluation_defaults_are_lavin_s() -> None:
    config, notes = parse_eval(["--ckpt_dir=W", "--adapter_path=a.pth", "--use_vicuna=True", "--adapter_type=repattn"])
    assert (config.split, config.bits) == ("val", "16bit")
    assert (config.adapter.vision, config.adapter.language) == ("normal", "attn")
    assert (config.model.language, config.model.delta) == ("W/7B", "../data/weights/vicuna_7B")
    assert (config.dataset.root, config.dataset.prompt_format) == ("../data", "QCM-ALE")
    assert ["no router" in note for note in notes] == [True]


def test_evaluation_in_8bit_stays_8bit() -> None:
    config, _ = parse_eval([*EVAL_7B_LITE.split(), "--bits", "8bit", "--legacy.eval_8bit_as_4bit"])
    assert (config.bits, config.legacy.eval_8bit_as_4bit) == ("8bit", True)
