"""A training run from its configuration to its report: build, say what will happen, train, evaluate, report."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.architecture import record
from engine.build import build_model, layout_of, open_dataset, open_scienceqa
from engine.config import Config, is_demo, run_directory
from engine.config_file import to_yaml
from engine.data.images import TileReader
from engine.data.loader import StepLoader
from engine.data.packing import form_of
from engine.data.preview import describe
from engine.data.rows import Rows
from engine.data.sample import Dataset
from engine.data.sampler import StepSampler
from engine.distributed import Ranks, ranks
from engine.environment import describe_environment, device_name
from engine.errors import INTERRUPTED, CheckpointError, NibbleError, Stopped, as_nibble_error
from engine.evaluation.validation import validation_loss
from engine.export.lavin_args import lavin_args
from engine.finish import finish
from engine.graphs import GraphedPasses
from engine.metrics import Metrics
from engine.optim import Optimizer
from engine.passes import choose_passes
from engine.pictures import processor
from engine.plan.make import bytes_of, make_plan, plan_text
from engine.plan.out_of_memory import Attempt, explained, present_card
from engine.plan.unpacked_memory import use_memory
from engine.precision import choose_device, choose_dtype
from engine.progress import Progress
from engine.resume import resume
from engine.rundir import RunDir
from engine.scaler import LossScaler
from engine.schedule import CosineSchedule
from engine.settle import settle_memory
from engine.setup import Setup
from engine.signals import StopSignals
from engine.sources import Sources, open_sources
from engine.starting import read_start
from engine.trainer import Trainer
from kernels.dispatch import set_backend
from models.vlm import VLMConfig
from models.weights.identity import identity
from models.weights.lavin import write_lavin_adapters

logger = logging.getLogger("nibble")


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
                with explained(Attempt(config, device, rundir, me)) as attempt:
                    _run(attempt, argv, max_steps)
            except (NibbleError, ValueError, RuntimeError, OSError, MemoryError, KeyboardInterrupt) as error:
                _record_error(rundir, me, error)
                if isinstance(error, Stopped) and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
                    print(error, file=sys.stderr)
                    return 0  # else the launcher would start the ranks again; exit.json says that the run was stopped
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
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # else a product on a CPU depends on where its tensors lie
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


def _run(attempt: Attempt, argv: Sequence[str], max_steps: int | None) -> None:
    config, device, rundir, me = attempt.config, attempt.device, attempt.rundir, attempt.ranks
    started = time.perf_counter()
    full = "full" in (config.train.language, config.train.vision)
    dtype, why = choose_dtype(config.runtime.precision, device, full_training=full)
    sources = open_sources(config)
    shape = record(config, sources)
    start = read_start(shape, Path(config.adapter.init), sources.files) if config.adapter.init else None
    dataset = open_dataset(config, sources.tokenizer, shape)
    sampler = StepSampler(len(dataset), config.optim.samples_per_step(me.world), config.seed)
    wanted = config.log.evaluate != "none"  # opened, and so checked, before the hours of training
    benchmark = open_scienceqa(config, sources.tokenizer, config.dataset.eval_split, shape) if wanted else None
    precision = f"{str(dtype).removeprefix('torch.')} ({why})"
    me.say(_before(config, sources, shape, dataset, sampler, me, device, precision))

    model = build_model(config, sources, device=device, dtype=dtype, is_main=me.is_main)
    if start is not None:
        start.put(model)
        me.say(f"adapters start from {start.source}")
    del start  # of a run that trained everything it is as large as the model
    reader = TileReader(processor(config, shape))
    setup = Setup(config, sources, model, reader, me, device, rundir, benchmark)
    if not config.model.language and not is_demo(config):
        me.say("warning: without --model.language your data train the demo's toy model of 640 word pieces")
    trainer = _trainer(setup, attempt, dataset, sampler, dtype)
    trainer.max_steps = max_steps
    resumed = resume(setup, trainer)
    spare = settle_memory(setup, trainer, dtype)
    attempt.begin_training(model.activation_policy, spare)
    unpacked = use_memory(config, model.language, device, dtype, spare)  # after DDP, which writes to every parameter
    if unpacked:
        me.say(f"unpacked   {unpacked}")
    if me.is_main:  # not before: a run that cannot be resumed like this keeps its config.yaml
        rundir.describe(to_yaml(config), argv, describe_environment(device), demo=is_demo(config))
    me.say(f"sample {describe(dataset.sample(sampler.indices(0)[0]), sources.tokenizer)}")

    with Progress(trainer.total_steps, me.is_main) as progress, StopSignals() as stop:
        with attempt.scoring():
            before = _accuracy_before(setup, trainer, progress)
        trainer.state_extras["accuracy_before"] = before
        if me.is_main:
            step = trainer.counters.step if resumed else None
            trainer.metrics = Metrics(rundir.path, resume_step=step, tensorboard=config.log.tensorboard)
        model.train()
        trainer.train(progress, stop)
        with attempt.scoring():
            after = setup.accuracy(progress)
    if trainer.metrics is not None:
        trainer.metrics.close()
    if me.is_main and max_steps is None:
        finish(setup, trainer, before, after, time.perf_counter() - started)


def _before(
    config: Config, sources: Sources, shape: VLMConfig, dataset: Dataset, sampler: StepSampler, me: Ranks,
    device: torch.device, precision: str,
) -> str:  # fmt: skip
    dense_bytes = 4 if precision.startswith("float32") else 2
    plan = make_plan(
        config, shape, str(sources.language.files[0].parent),
        num_ranks=me.world, dense_bytes=dense_bytes, on_cuda=device.type == "cuda", samples=len(dataset),
        weight_bytes=bytes_of(sources.files), card=present_card(device),
    )  # fmt: skip
    steps = sampler.steps_per_epoch
    lines = [
        plan_text(plan),
        f"device     {device_name(device)}, {me.world} rank{'s' if me.world > 1 else ''}, {precision}",
        f"data       {len(dataset):,} samples, {steps:,} steps an epoch, {steps * config.optim.epochs:,} in all",
    ]
    return "\n".join(lines)


def _trainer(setup: Setup, attempt: Attempt, dataset: Dataset, sampler: StepSampler, dtype: torch.dtype) -> Trainer:
    config, me = setup.config, setup.ranks
    optim = config.optim
    passes = choose_passes(config, setup.model, setup.device, me, len(dataset))
    loader = StepLoader(
        dataset, sampler, setup.reader, tokens_per_batch=config.runtime.tokens_per_batch, reduction=optim.reduction,
        micro_batch=optim.batch_size, rank=me.rank, ranks=me.world, num_workers=config.dataset.num_workers,
        legacy_clip_router=config.legacy.clip_router, few_shapes=isinstance(passes, GraphedPasses),
        pinned=setup.device.type == "cuda", places=passes.places, form=form_of(setup.model.config),
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
        passes=passes,
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
        validate=_validation(setup, attempt),
        on_epoch_end=lambda epoch: _write_lavin(setup, epoch),
        state_extras={
            "base": identity(setup.sources.files), "samples_per_step": optim.samples_per_step(me.world),
            "samples": len(dataset),
        },
    )  # fmt: skip


def _validation(setup: Setup, attempt: Attempt) -> _Validation | None:
    if not setup.config.eval_data:
        return None
    layout = layout_of(setup.config, setup.sources.tokenizer, setup.model.config)
    return _Validation(setup, attempt, Rows(setup.config.eval_data, setup.config.image_folder, layout))


@dataclass(frozen=True, slots=True)
class _Validation:
    """The validation loss of the rows of --eval_data."""

    setup: Setup
    attempt: Attempt
    dataset: Dataset

    def __call__(self) -> float:
        s = self.setup
        with self.attempt.scoring():
            return validation_loss(
                s.model, self.dataset, s.reader, s.ranks,
                tokens_per_batch=s.config.runtime.tokens_per_batch, device=s.device,
            )  # fmt: skip


def _accuracy_before(setup: Setup, trainer: Trainer, progress: Progress) -> Mapping[str, float]:
    if setup.config.log.evaluate != "both":
        return {}
    kept: Mapping[str, float] = trainer.state_extras.get("accuracy_before", {})
    return kept or setup.accuracy(progress)


def _write_lavin(setup: Setup, epoch: int) -> None:
    if not setup.config.log.lavin_checkpoints:
        return
    args = lavin_args(setup.config)
    path = setup.rundir.path / f"checkpoint-{epoch}.pth"
    try:
        write_lavin_adapters(path, setup.model.trainable(), epoch=epoch, args=args, module_prefix=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot save {path.name}: {error.strerror or error}", where=str(path.parent),
            why="the earlier checkpoints were not touched", do="make room, then --resume auto",
        ) from error  # fmt: skip
