"""A training run from its configuration to its report: build, say what will happen, train, evaluate, report."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.build import (
    Sources,
    build_model,
    layout_of,
    load_trained,
    open_dataset,
    open_scienceqa,
    open_sources,
    router_temperature,
    vlm_config,
)
from engine.checkpoint import find_latest, load_checkpoint
from engine.config import Config, is_demo, run_directory
from engine.config_file import to_yaml
from engine.data.images import TileReader
from engine.data.loader import StepLoader
from engine.data.preview import describe
from engine.data.rows import Rows
from engine.data.sample import Dataset
from engine.data.sampler import StepSampler
from engine.data.scienceqa import ScienceQA
from engine.distributed import Ranks, ranks
from engine.environment import describe_environment, device_name
from engine.errors import INTERRUPTED, CheckpointError, NibbleError, as_nibble_error
from engine.evaluation.letters import predict
from engine.evaluation.score import score_table
from engine.evaluation.validation import validation_loss
from engine.metrics import Metrics, read_metrics, series
from engine.optim import Optimizer
from engine.plan import make_plan, plan_text
from engine.plot import loss_svg
from engine.precision import choose_device, choose_dtype
from engine.progress import Progress
from engine.report import FinalMetrics, terminal_report, write_final_metrics, write_report
from engine.rundir import RunDir
from engine.scaler import LossScaler
from engine.schedule import CosineSchedule
from engine.signals import StopSignals
from engine.trainer import Trainer
from kernels.dispatch import set_backend
from models.vlm import VisionLanguageModel
from models.weights.identity import check_identity, identity
from models.weights.lavin import write_lavin_adapters

logger = logging.getLogger("nibble")


@dataclass(frozen=True, slots=True)
class Setup:
    """What every part of a run needs to know."""

    config: Config
    sources: Sources
    model: VisionLanguageModel
    reader: TileReader
    ranks: Ranks
    device: torch.device
    rundir: RunDir
    benchmark: ScienceQA | None  # the evaluation split, where --log.evaluate asks for it

    def accuracy(self, progress: Progress) -> dict[str, float]:
        """The score table of the benchmark, computed on every rank alike; empty without one."""
        dataset = self.benchmark
        if dataset is None:
            return {}
        progress.note(f"scoring {len(dataset):,} problems of the {self.config.dataset.eval_split} split")
        guesses = predict(
            self.model, dataset, self.reader.tile,
            tokens_per_batch=self.config.runtime.tokens_per_batch, device=self.device,
        )  # fmt: skip
        return score_table(dataset.problems, guesses)


def train(config: Config, argv: Sequence[str], notes: Sequence[str], max_steps: int | None = None) -> int:
    """Runs `train.py`. `argv` is what was typed; `notes` are warnings about it; `max_steps` ends the run earlier than
    its epochs. Returns the exit code."""
    _set_runtime(config)
    device_type = choose_device(config.runtime.device, 0).type
    with ranks(device_type) as me:
        device = choose_device(config.runtime.device, me.local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        rundir = RunDir(run_directory(config))
        with _claimed(rundir, config, me), _log_file(rundir, me):
            try:
                for note in notes if me.is_main else ():
                    logger.warning("%s", note)
                _run(config, argv, me, device, rundir, max_steps)
            except (NibbleError, ValueError, RuntimeError, OSError, MemoryError, KeyboardInterrupt) as error:
                _record_error(rundir, me, error)
                raise
            if me.is_main:
                rundir.write_exit(0, "finished")
    return 0


def _record_error(rundir: RunDir, me: Ranks, error: BaseException) -> None:
    """log.txt gets the traceback, exit.json the code.

    Raises:
        SystemExit: another rank has told why the run ends; that it is gone is all that this rank knows.
    """
    known = as_nibble_error(error)
    logger.error("the run ended with an error on rank %d", me.rank, exc_info=error)
    if known is None and me.world > 1 and rundir.exit.exists():
        raise SystemExit(1) from error
    code = known.exit_code if known else INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    try:
        rundir.write_exit(code, str(known or repr(error)))
    except OSError as problem:  # a full disk may be why the run ends
        logger.warning("cannot write %s: %s", rundir.exit, problem)


def _set_runtime(config: Config) -> None:
    if config.runtime.kernels != "auto":  # else NIBBLE_KERNELS may say
        set_backend(config.runtime.kernels)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    if config.runtime.deterministic:
        torch.use_deterministic_algorithms(True)


@contextmanager
def _claimed(rundir: RunDir, config: Config, me: Ranks) -> Iterator[None]:
    """The main rank holds the run directory; the others wait until it does, and leave where it cannot."""

    def claim() -> None:
        rundir.claim(resume=bool(config.resume), demo=is_demo(config))

    me.from_main(claim)
    try:
        yield
    finally:
        if me.is_main:
            rundir.release()


@contextmanager
def _log_file(rundir: RunDir, me: Ranks) -> Iterator[None]:
    """log.txt has everything of the main rank and the errors of the others, with tracebacks; the terminal has the
    main rank's warnings, what the run says itself, and from run_command the error that ended it."""
    root = logging.getLogger("nibble")
    root.setLevel(logging.DEBUG)
    file = logging.FileHandler(rundir.log, encoding="utf-8", delay=True)
    file.setLevel(logging.DEBUG if me.is_main else logging.ERROR)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = logging.StreamHandler()
    terminal.setFormatter(logging.Formatter("warning: %(message)s"))
    terminal.addFilter(lambda record: me.is_main and record.levelno == logging.WARNING)
    for handler in (file, terminal):
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, terminal):
            root.removeHandler(handler)
            handler.close()


def _run(
    config: Config, argv: Sequence[str], me: Ranks, device: torch.device, rundir: RunDir, max_steps: int | None
) -> None:
    started = time.perf_counter()
    full = "full" in (config.train.language, config.train.vision)
    dtype, why = choose_dtype(config.runtime.precision, device, full_training=full)
    sources = open_sources(config)
    config.adapter.temperature = router_temperature(config, sources.language.config)  # as the run records it
    dataset = open_dataset(config, sources.tokenizer)
    sampler = StepSampler(len(dataset), config.optim.samples_per_step(me.world), config.seed)
    wanted = config.log.evaluate != "none"  # opened, and so checked, before the hours of training
    benchmark = open_scienceqa(config, sources.tokenizer, config.dataset.eval_split) if wanted else None
    _say(me, _before(config, sources, dataset, sampler, me, device, f"{str(dtype).removeprefix('torch.')} ({why})"))

    model = build_model(config, sources, device=device, dtype=dtype, on_tensor=lambda name: None)
    if config.adapter.init:
        _say(me, f"adapters start from {load_trained(model, Path(config.adapter.init), sources.files)}")
    reader = TileReader(sources.vision.config.image_size)
    setup = Setup(config, sources, model, reader, me, device, rundir, benchmark)
    trainer = _trainer(setup, dataset, sampler, dtype)
    trainer.max_steps = max_steps
    resumed = _resume(setup, trainer)
    if me.is_main:  # not before: a run that cannot be resumed like this keeps its config.yaml
        rundir.describe(to_yaml(config), argv, describe_environment(device), demo=is_demo(config))
    _say(me, f"sample {describe(dataset.sample(sampler.indices(0)[0]), sources.tokenizer)}")

    with Progress(trainer.total_steps, me.is_main) as progress, StopSignals() as stop:
        before = _accuracy_before(setup, trainer, progress)
        trainer.state_extras["accuracy_before"] = before
        if me.is_main:
            step = trainer.counters.step if resumed else None
            trainer.metrics = Metrics(rundir.path, resume_step=step, tensorboard=config.log.tensorboard)
        model.train()
        trainer.train(progress, stop)
        after = setup.accuracy(progress)
    if me.is_main:
        _finish(setup, trainer, before, after, time.perf_counter() - started)


def _say(me: Ranks, text: str) -> None:
    if me.is_main:
        print(text, file=sys.stderr, flush=True)
        logger.info("%s", text)


def _before(
    config: Config, sources: Sources, dataset: Dataset, sampler: StepSampler, me: Ranks, device: torch.device,
    precision: str,
) -> str:  # fmt: skip
    dense_bytes = 4 if precision.startswith("float32") else 2
    shapes = vlm_config(config, sources.language.config, sources.vision.config)
    plan = make_plan(
        config, shapes, str(sources.language.files[0].parent),
        num_ranks=me.world, dense_bytes=dense_bytes, on_cuda=device.type == "cuda",
    )  # fmt: skip
    steps = sampler.steps_per_epoch
    lines = [
        plan_text(plan),
        f"device     {device_name(device)}, {me.world} rank{'s' if me.world > 1 else ''}, {precision}",
        f"data       {len(dataset):,} samples, {steps:,} steps an epoch, {steps * config.optim.epochs:,} in all",
    ]
    return "\n".join(lines)


def _trainer(setup: Setup, dataset: Dataset, sampler: StepSampler, dtype: torch.dtype) -> Trainer:
    config, me = setup.config, setup.ranks
    optim = config.optim
    loader = StepLoader(
        dataset, sampler, setup.reader, tokens_per_batch=config.runtime.tokens_per_batch, reduction=optim.reduction,
        micro_batch=optim.batch_size, rank=me.rank, ranks=me.world, num_workers=config.dataset.num_workers,
        legacy_clip_router=config.legacy.clip_router,
    )  # fmt: skip
    schedule = CosineSchedule(
        lr=optim.peak_lr(me.world), min_lr=optim.min_lr, epochs=optim.epochs, warmup_epochs=optim.warmup_epochs,
        steps_per_epoch=sampler.steps_per_epoch, step_share=sampler.step_share(optim.batch_size * me.world),
    )  # fmt: skip
    return Trainer(
        config=config,
        model=setup.model,
        wrapped=me.wrap(setup.model),
        loader=loader,
        optimizer=Optimizer(
            setup.model.named_parameters(), weight_decay=optim.weight_decay,
            beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps,
        ),
        schedule=schedule,
        scaler=LossScaler(enabled=dtype == torch.float16),
        rundir=setup.rundir,
        metrics=None,
        ranks=me,
        device=setup.device,
        steps_per_epoch=sampler.steps_per_epoch,
        validate=_validation(setup),
        on_epoch_end=lambda epoch: _write_lavin(setup, epoch),
        state_extras={
            "base": identity(setup.sources.files), "samples_per_step": optim.samples_per_step(me.world),
            "samples": len(dataset),
        },
    )  # fmt: skip


def _validation(setup: Setup) -> _Validation | None:
    if not setup.config.eval_data:
        return None
    layout = layout_of(setup.config, setup.sources.tokenizer)
    return _Validation(setup, Rows(setup.config.eval_data, setup.config.image_folder, layout))


@dataclass(frozen=True, slots=True)
class _Validation:
    """The validation loss of the rows of --eval_data."""

    setup: Setup
    dataset: Dataset

    def __call__(self) -> float:
        s = self.setup
        return validation_loss(
            s.model, self.dataset, s.reader, s.ranks,
            tokens_per_batch=s.config.runtime.tokens_per_batch, device=s.device,
        )  # fmt: skip


def _resume(setup: Setup, trainer: Trainer) -> bool:
    """Puts the state of --resume back. Returns whether there was one."""
    wanted, run = setup.config.resume, setup.rundir.path
    if not wanted:
        return False
    path = setup.ranks.from_main(lambda: find_latest(run)) if wanted == "auto" else Path(wanted)
    if path is None:
        _say(setup.ranks, f"nothing to resume in {run}: the run begins")
        return False
    tensors, state = load_checkpoint(path, "size" if wanted == "auto" else "full")  # "auto" has just read all of it
    check_identity(state["base"], setup.sources.files)
    here = {"seed": setup.config.seed, **trainer.state_extras}
    was, now = (f"seed {s['seed']}, {s['samples_per_step']} of {s['samples']} samples a step" for s in (state, here))
    if was != now:
        raise CheckpointError(
            f"{path} was trained with {was}; this command says {now}",
            why="the order of the samples would be another", do="resume with the settings of its config.yaml",
        )  # fmt: skip
    trainer.load(tensors, state, path)
    trainer.state_extras["accuracy_before"] = state.get("accuracy_before", {})
    _say(setup.ranks, f"resumed from {path}")
    return True


def _accuracy_before(setup: Setup, trainer: Trainer, progress: Progress) -> Mapping[str, float]:
    if setup.config.log.evaluate != "both":
        return {}
    kept: Mapping[str, float] = trainer.state_extras.get("accuracy_before", {})
    return kept or setup.accuracy(progress)


def _write_lavin(setup: Setup, epoch: int) -> None:
    if not setup.config.log.lavin_checkpoints:
        return
    config = setup.config
    args = {
        "bits": config.bits, "adapter_type": config.adapter.language, "visual_adapter_type": config.adapter.vision,
        "adapter_dim": config.adapter.dim, "adapter_scale": config.adapter.scale,
        "temperature": config.adapter.temperature, "hidden_proj": config.model.projector_hidden, "n_prompt": 6,
        "max_seq_len": config.dataset.max_seq_len, "prompt_format": config.dataset.prompt_format,
        "optim": asdict(config.optim), "seed": config.seed,
    }  # fmt: skip
    path = setup.rundir.path / f"checkpoint-{epoch}.pth"
    try:
        write_lavin_adapters(path, setup.model.trainable(), epoch=epoch, args=args, module_prefix=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot save {path.name}: {error.strerror or error}", where=str(path.parent),
            why="the earlier checkpoints were not touched", do="make room, then --resume auto",
        ) from error  # fmt: skip


def _finish(
    setup: Setup, trainer: Trainer, before: Mapping[str, float], after: Mapping[str, float], seconds: float
) -> None:
    assert trainer.metrics is not None
    trainer.metrics.close()
    rundir, c = setup.rundir, trainer.counters
    rows = read_metrics(rundir.metrics_jsonl)
    rundir.loss_svg.write_text(loss_svg(series(rows, "loss"), series(rows, "eval_loss")), encoding="utf-8")
    final = FinalMetrics(
        accuracy=after, accuracy_before=before, loss=trainer.loss_ema.value,
        steps=c.step, samples_per_second=c.samples / c.seconds, tokens_per_second=c.tokens / c.seconds,
        peak_memory_bytes=_peak_memory(setup.device), packing_efficiency=c.tokens / c.packed_tokens,
        trainable_parameters=sum(p.numel() for p in setup.model.trainable().values()),
        wall_seconds=seconds, device=device_name(setup.device),
    )  # fmt: skip
    write_final_metrics(rundir.metrics_final, final)
    next_commands = _next_commands(setup)
    title = f"nibble: {rundir.path}"
    write_report(rundir.report, title, final, next_commands)
    print(terminal_report(title, final, rundir.report, next_commands), flush=True)
    print(f"loss plot: {rundir.loss_svg}")


def _next_commands(setup: Setup) -> list[str]:
    run = setup.rundir.path
    commands = [f"python chat.py --run {run} --image PICTURE.png --question 'What is shown?'"]
    if setup.config.dataset.root or not setup.config.data:
        commands.insert(0, f"python eval.py --run {run} --task scienceqa")
    return commands


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
