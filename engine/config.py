"""The configuration tree: every choice that a person can make, typed, with a default that runs and its help text.

A flag is the path in this tree (--optim.lr 1e-4), a recipe is the same tree as YAML, and the docstring under a field is
what --help prints. Cross-field checks are in engine/checks.py, the parsing of flags in engine/flags.py. No torch here:
--help must be quick.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

LAVIN_LENGTH = 512  # tokens of a sample
Bits = Literal["4bit", "8bit", "16bit"]
BITS = {"4bit": 4, "8bit": 8, "16bit": 16}
Trained = Literal["frozen", "mma", "lora", "full"]


@dataclass(kw_only=True, slots=True)
class Model:
    """The networks and where their weights are. Without weights a small embedded demo model is used."""

    language: str = ""
    """Folder or Hub id of a language model or of a whole vision-language model. Empty: the embedded demo."""
    tokenizer: str = ""
    """tokenizer.model or tokenizer.json. Empty: the one in the language model's folder, or in the folder above."""
    vision: str = ""
    """Folder, file or Hub id of a CLIP, EVA02-CLIP or SigLIP tower. Empty: a VLM checkpoint's, else searched for."""
    delta: str = ""
    """Hugging Face folder whose weights are added to the language model's (a Vicuna delta)."""
    projector: str = "auto"
    """lavin, linear, mlpNx_gelu, identity, Bunny's sppv1 to sppv3, minigpt, vanilla, or ldp. auto: a VLM checkpoint's;
    else lavin (CLIP and MMA) or mlp2x_gelu."""
    projector_hidden: int = 128
    """Width of the hidden layer of the lavin projector."""
    projector_weights: str = ""
    """Projector weights to start from: mm_projector.bin, or a folder with it."""
    select_layer: int | None = None
    """Layer of the tower whose tokens are taken, as -2. None: what a VLM checkpoint says, else -2. Not with lavin."""
    select_feature: Literal["auto", "patch", "cls_patch"] = "auto"
    """Which tokens: patches, or the class token too. auto: what a VLM checkpoint says, else patch. Not with lavin."""
    s2: str = "auto"
    """Pixels a side at which a SigLIP tower sees a picture (S2), 384,768,1152. auto: a VLM checkpoint's, else none."""
    patch_merge: Literal["auto", "flat", "spatial", "spatial_unpad"] = "auto"
    """How the tokens of anyres tiles are put together: one tile after another, or row by row of the picture, without
    the tiles' black bars (unpad). auto: what a VLM checkpoint says, else flat."""
    drop_path: float = 0.0
    """Probability to drop a residual branch of the language model while training."""
    cache_weights: bool = True
    """Keep the quantized weights in NIBBLE_CACHE for the next start. With --bits 16bit nothing is gained or kept."""


@dataclass(kw_only=True, slots=True)
class Adapter:
    """The MMA adapters: a linear bottleneck with two ways up, mixed by a router."""

    dim: int = 8
    """Width of the bottleneck, an even number."""
    scale: float = 1.0
    """Factor of what the adapter adds."""
    temperature: float | None = None
    """Temperature of the router's softmax. None: what the file of init says, else 10 (5 for 13B)."""
    dropout: float = 0.1
    """Dropout on the bottleneck while training."""
    language: Literal["attn", "block"] = "attn"
    """Where the language model has adapters: before attention, or also before the MLP."""
    vision: Literal["normal", "router", "router_block"] = "router"
    """The vision tower's adapters: without router, with one, or with one also before the MLP."""
    init: str = ""
    """Weights to start from: one of LaVIN's .pth files, a run directory of ours, or a LoRA folder (PEFT's, LLaVA's)."""


@dataclass(kw_only=True, slots=True)
class Lora:
    """LoRA: a low-rank update of linears, for each part whose `train` says lora."""

    rank: int | None = None
    """Rank of the update. None: what the LoRA folder of adapter.init says, else 64."""
    alpha: float | None = None
    """The update is scaled by alpha / rank. None: what the LoRA folder of adapter.init says, else 16."""
    dropout: float = 0.05
    """Dropout on the update's input while training."""
    targets: str = ""
    """Linears of the language model, q_proj,v_proj or attention.q,mlp.up. Empty: all in its blocks. A tower: all."""


@dataclass(kw_only=True, slots=True)
class Train:
    """What learns, part by part."""

    language: Trained = "mma"
    """The language model: frozen, MMA adapters, LoRA, or every weight (16bit only)."""
    vision: Literal["auto", "frozen", "mma", "lora", "full"] = "auto"
    """The vision tower: as the language model. auto: frozen where the language model trains LoRA, else mma."""
    projector: Literal["frozen", "full"] = "full"
    """The projector between the two. Alone (LLaVA's stage 1): --train.language frozen --train.vision frozen."""


@dataclass(kw_only=True, slots=True)
class Dataset:
    """How rows become samples."""

    format: Literal["auto", "scienceqa", "chat", "rows"] = "auto"
    """What the data are; auto looks at what was given (dataset.root: scienceqa, data: rows)."""
    root: str = ""
    """Folder with problems.json, pid_splits.json and images/ (scienceqa), or all_data.json (chat)."""
    captions: str = ""
    """captions.json, read with use_caption only. Empty: the one in root."""
    split: str = "train"
    """ScienceQA split to train on."""
    eval_split: str = "test"
    """ScienceQA split to evaluate on."""
    prompt_format: str = "QCM-ALE"
    """What the prompt and the answer hold: Question, Context, Multiple choice, Lecture, Explanation, Answer."""
    use_caption: bool = False
    """Add the picture's caption to the context."""
    options: str = "ABCDE"
    """Letters of the choices."""
    max_seq_len: int | None = None
    """Tokens after which a sample is cut. None: what a VLM checkpoint says, else 512 where a picture takes few tokens
    (LaVIN), 2,048 where it takes many (LLaVA, Bunny), 4,096 with anyres (LLaVA-NeXT)."""
    image_aspect_ratio: Literal["auto", "square", "pad", "anyres"] = "auto"
    """How pictures fit the tower: cut or squashed to its square, padded to one, or cut into tiles (anyres). auto: what
    a VLM checkpoint says, else square."""
    anyres_grids: str = "auto"
    """Tiles across x down that anyres chooses from, 2x2,1x3. auto: a VLM checkpoint's, else 1x2,2x1,2x2,3x1,1x3."""
    num_workers: int = 2
    """Threads that prepare steps ahead: rows, pictures, packs. 0: none."""


@dataclass(kw_only=True, slots=True)
class Optim:
    """AdamW and its schedule: a linear warm-up, then half a cosine."""

    batch_size: int = 32
    """Samples per rank and micro-batch."""
    accum_iter: int = 1
    """Micro-batches per step."""
    epochs: int = 20
    """Passes over the data."""
    lr: float | None = None
    """Peak learning rate. None: blr x samples per step / 256."""
    blr: float = 9e-3
    """Base learning rate, per 256 samples of a step."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.02
    """Decay of matrices; vectors and biases have none."""
    warmup_epochs: float = 2.0
    """Epochs of linear warm-up."""
    clip_grad: float | None = None
    """Largest norm of the gradient. None: not clipped."""
    beta1: float = 0.9
    """AdamW's first beta."""
    beta2: float = 0.95
    """AdamW's second beta."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    reduction: Literal["token", "sample", "micro_batch"] = "token"
    """What the loss is the mean of: all supervised tokens of a step, its samples, or its micro-batches' means."""

    def samples_per_step(self, num_ranks: int) -> int:
        """Samples that one optimiser step sees, over all ranks."""
        return self.batch_size * self.accum_iter * num_ranks

    def peak_lr(self, num_ranks: int) -> float:
        """The learning rate after the warm-up: `lr`, or blr * samples_per_step / 256 (the rule of MAE and LaVIN)."""
        return self.blr * self.samples_per_step(num_ranks) / 256 if self.lr is None else self.lr


@dataclass(kw_only=True, slots=True)
class Runtime:
    """The machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of activations; auto: bf16 on sm_80 and newer, fp16 below, fp32 on the CPU."""
    tokens_per_batch: int = 2048
    """Most tokens in a pack (never less than the longest sample)."""
    kernels: Literal["auto", "triton", "cuda", "reference"] = "auto"
    """Backend of the operators that have it; an explicit choice never falls back where it cannot run."""
    deterministic: bool = False
    """Bitwise repeatable runs on a GPU, at some cost in speed."""
    threads: int = 0
    """CPU threads of torch. 0: torch's own choice."""
    unpacked_memory: str = "auto"
    """GPU memory for 16-bit copies of quantized weights: 4GB. auto: what the memory budget leaves. 0: one buffer."""
    few_rows: int | None = None
    """Up to how many rows (64 at most) a product takes packed weights on a GPU as they are. None: the card's table."""
    prefetch: bool = False
    """Unpack the next quantized weights on a second stream while a product runs; takes a layer of 16-bit weights."""
    cuda_graphs: bool = True
    """Launch a pack's forward and backward pass as one CUDA graph (one GPU, not with deterministic or --debug)."""


@dataclass(kw_only=True, slots=True)
class Log:
    """What is written, and how often."""

    every: int = 10
    """Steps between two lines of metrics."""
    save_every: int = 0
    """Steps between two checkpoints. 0: one at the end of each epoch."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs tensorboard)."""
    evaluate: Literal["none", "after", "both"] = "none"
    """Score the evaluation split after training, or before and after it (scienceqa)."""
    lavin_checkpoints: bool = False
    """Also write LaVIN's checkpoint-{epoch}.pth, adapter tensors only, each epoch."""


@dataclass(kw_only=True, slots=True)
class Legacy:
    """Reproduce a defect of LaVIN, for parity with its published files and figures."""

    clip_router: bool = False
    """Route all pictures of a batch by its first one."""
    decode_positions: bool = False
    """Repeat the last prompt position at the first generated token."""
    normal_adapter: bool = False
    """The `normal` vision adapter without its residual."""
    vicuna_permutation: bool = False
    """Add the delta's q and k rows without un-permuting them."""
    block_routing: bool = False
    """Route the MLP adapter of `block` by the layer's input when evaluating."""
    score_whole_text: bool = False
    """Look for the answer in the prompt too."""
    eval_8bit_as_4bit: bool = False
    """Evaluate with 4 bits where 8bit is asked for."""
    chat_length: bool = False
    """Cut chat samples at 512 tokens, whatever max_seq_len says."""


@dataclass(kw_only=True, slots=True)
class Config:
    """A training run. Everything has a default: without any flag the embedded demo is trained."""

    bits: Bits = "4bit"
    """Bits of the frozen weights of the language model's layers."""
    bits_head: Bits = "16bit"
    """Bits of the language model's output head."""
    bits_vision: Bits = "16bit"
    """Bits of the vision tower's linears."""
    data: str = ""
    """Your rows, LLaVA-style .json or .jsonl. Empty: dataset.root, or the embedded demo."""
    image_folder: str = ""
    """Folder that the rows' pictures are named from."""
    output_dir: str = ""
    """Run directory. Empty: runs/NAME, NAME after the recipe, the data or the demo."""
    recipe: str = ""
    """YAML file with a whole configuration; flags override it."""
    eval_data: str = ""
    """Rows for the validation loss, in the format of `data`; the best step is kept."""
    eval_every: int = 0
    """Steps between two validation losses of eval_data. 0: one at the end."""
    resume: str = ""
    """`auto` (the newest checkpoint of the run directory) or a step directory."""
    seed: int = 0
    """Seed of everything random."""
    memory_budget: str = ""
    """Memory of a run: 24GB. Layers recompute what does not fit. Empty: what is free; on a CPU without limit."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and recompute the rest, whatever the memory."""
    plan: bool = False
    """Print what the run needs (memory by part, disk, speed and verdict by card) and end; no GPU or weights needed."""
    json: bool = False
    """Print the plan as JSON."""
    dry_run: bool = False
    """Take two steps, save, reload, throw it all away, end."""
    debug: bool = False
    """Show tracebacks."""
    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    lora: Lora = field(default_factory=Lora)
    train: Train = field(default_factory=Train)
    dataset: Dataset = field(default_factory=Dataset)
    optim: Optim = field(default_factory=Optim)
    runtime: Runtime = field(default_factory=Runtime)
    log: Log = field(default_factory=Log)
    legacy: Legacy = field(default_factory=Legacy)


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """An evaluation, of a run (--run) or of an adapter file on its base weights (--model.language, --adapter.init)."""

    run: str = ""
    """Run directory to evaluate; its configuration says what the model and the data are."""
    task: Literal["scienceqa"] = "scienceqa"
    """Benchmark."""
    split: str = "test"
    """Split of the benchmark."""
    generate: bool = False
    """Generate the whole answer and search it, instead of scoring the choices in one pass."""
    num: int = 0
    """Evaluate the first so many items only. 0: all of them."""
    output: str = ""
    """File for the scores as JSON. Empty: eval-{task}-{split}.json beside what is evaluated."""
    max_batch_size: int = 32
    """Most answers that are generated together, if runtime.tokens_per_batch has room for them with their prompts."""
    max_new_tokens: int = 64
    """Longest generated answer."""
    generation_temperature: float = 0.1
    """Sampling temperature of generation. 0: the most likely token."""
    top_p: float = 0.75
    """Probability mass that generation samples from."""
    seed: int = 1
    """Seed of sampling."""
    debug: bool = False
    """Show tracebacks."""
    bits: Bits = "4bit"
    """Bits of the frozen weights of the language model's layers."""
    bits_head: Bits = "16bit"
    """Bits of the language model's output head."""
    bits_vision: Bits = "16bit"
    """Bits of the vision tower's linears."""
    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    dataset: Dataset = field(default_factory=Dataset)
    runtime: Runtime = field(default_factory=Runtime)
    legacy: Legacy = field(default_factory=Legacy)


@dataclass(kw_only=True, slots=True)
class ChatConfig:
    """A conversation with a trained run."""

    run: str = "runs/demo"
    """Run directory to talk to."""
    image: str = ""
    """Picture to talk about. Empty: text only."""
    question: str = ""
    """Answer this and end. Empty: read questions from the terminal."""
    max_new_tokens: int = 128
    """Longest answer."""
    temperature: float = 0.1
    """Sampling temperature. 0: the most likely token."""
    top_p: float = 0.75
    """Probability mass that is sampled from."""
    seed: int = 0
    """Seed of sampling."""
    debug: bool = False
    """Show tracebacks."""
    runtime: Runtime = field(default_factory=Runtime)


def leaves(tree: type) -> dict[str, Any]:
    """Path of every leaf of a configuration class -> its type, in the order of --help: {"optim.lr": float | None}."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(tree).items():
        if dataclasses.is_dataclass(kind):
            found |= {f"{name}.{path}": leaf for path, leaf in leaves(typing.cast(type, kind)).items()}
        else:
            found[name] = kind
    return found


def get(config: object, path: str) -> Any:
    """The value at a dotted path of a configuration."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def is_demo(config: Config) -> bool:
    """Whether nothing was named to train on: neither data nor a base model."""
    return not (config.data or config.dataset.root or config.model.language)


def dataset_format(config: Config) -> str:
    """scienceqa, chat or rows; `auto` goes by what was named."""
    if config.dataset.format != "auto":
        return config.dataset.format
    return "rows" if config.data else "scienceqa"


def trained_vision(config: Config) -> Trained:
    """What learns in the tower; `auto` is LaVIN's adapters, but where the language model has LoRA nothing: the tower of
    LLaVA and Bunny."""
    if config.train.vision != "auto":
        return config.train.vision
    return "frozen" if config.train.language == "lora" else "mma"


def longest_sample(config: Config) -> int:
    """Tokens after which a sample is cut, its modality token among them; LaVIN's until it is known what a picture takes
    (engine/pictures.py)."""
    chat_cut = config.legacy.chat_length and dataset_format(config) == "chat"
    return LAVIN_LENGTH if chat_cut or config.dataset.max_seq_len is None else config.dataset.max_seq_len


def run_directory(config: Config) -> Path:
    """Where the run lives: output_dir, or runs/ and the name of the recipe, of the data or of the demo."""
    if config.output_dir:
        return Path(config.output_dir)
    if config.recipe or config.data:
        return Path("runs") / Path(config.recipe or config.data).stem
    return Path("runs") / (Path(config.dataset.root).resolve().name if config.dataset.root else "demo")
