"""One rank of a run from its start to an evaluation, by the code that a training run uses."""

import contextlib
import dataclasses
import gc
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_moe_lpr.checkpoint.saving.saver import CheckpointSaver
from megatron_moe_lpr.data.reading.training_dataset import TrainingDataset
from megatron_moe_lpr.engine.routing import reset_routing, set_newest_weight
from megatron_moe_lpr.engine.step import training_step
from megatron_moe_lpr.evaluation.losses import evaluate_dataset
from megatron_moe_lpr.model.configuration.config import ModelShape
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.parallel.first_rank import restart_count
from megatron_moe_lpr.rehearsal.checkpoints import nothing_is_read, sizes_are_written
from megatron_moe_lpr.rehearsal.record import PHASES, Phase, RankRecord
from megatron_moe_lpr.rehearsal.recorder import Recorder
from megatron_moe_lpr.rehearsal.routing import balance
from megatron_moe_lpr.rehearsal.sizes_only import SizesOnly
from megatron_moe_lpr.rehearsal.storages import StorageLog
from megatron_moe_lpr.rehearsal.world import rank_of_world
from megatron_moe_lpr.training.batches import global_batches
from megatron_moe_lpr.training.checkpointing import start_save
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.run_directory.start_marker import mark_start
from megatron_moe_lpr.training.setup import Run, checkpoint_card, prepare

WEIGHT_SCALE = 0.02
"""Standard deviation of random weights, where values are computed."""


@dataclasses.dataclass
class Rehearsed:
    """A rehearsed rank."""

    record: RankRecord
    coordinates: dict[str, int]
    """Its place in each parallel dimension."""
    at_peak: Counter[str]
    """Bytes beside parameters, gradients and optimizer at the peak of the step, by the place that made them."""
    shape: ModelShape
    trains: frozenset[ParameterKind]
    bf16: bool
    distributed_optimizer: bool
    loss: float
    """Of the step and of the evaluation, where values are computed."""


class Rehearsal:
    """Rehearses ranks of one run after each other. Rank 0 must be the first: the others hear from it."""

    def __init__(self, config: TrainingConfig, world_size: int, directory: Path, computes: bool = False) -> None:
        """Prepare directories.

        Args:
            config: the run; its --load and datasets exist.
            directory: for what the run writes.
            computes: compute all values, from random weights.
        """
        self.world_size, self.directory, self.computes = world_size, directory, computes
        self.config = config
        self.stores: defaultdict[str, dist.Store] = defaultdict(dist.HashStore)
        self.rank_0_objects: dict[str, list[Any]] = {}
        for name in ("run", "saved"):
            (directory / name).mkdir()
            mark_start(directory / name)

    def rehearse(self, rank: int, phases: tuple[Phase, ...] = PHASES) -> Rehearsed:
        """Be one rank: start, train one step and save; in a second life resume and evaluate.

        Args:
            phases: those to go through; start and step always.

        Raises:
            UserError: what a training run would raise.
        """
        record = RankRecord(rank)
        with self._life("start", record) as (recorder, mode):
            run = prepare(self._config_of("run"))
            result = _step(run, record, recorder, mode)
            if "save" in phases:
                recorder.phase = "save"
                self._save(run, record)
            del run
        if "resume" in phases:
            with self._life("resume", record) as (recorder, mode):
                run = prepare(self._config_of("saved"))
                if "evaluate" in phases:
                    recorder.phase = "evaluate"
                    _evaluate(run, mode)
                del run
        return result

    def _config_of(self, save: str) -> TrainingConfig:
        checkpoint = dataclasses.replace(self.config.checkpoint, save=self.directory / save)
        return dataclasses.replace(self.config, checkpoint=checkpoint)

    @contextlib.contextmanager
    def _life(self, phase: Phase, record: RankRecord) -> Iterator[tuple[Recorder, SizesOnly]]:
        """A process of the rank: a world of its own, every collective recorded, tensors of sizes alone."""
        recorder = Recorder(record.rank, self.rank_0_objects.get(phase))
        recorder.phase = phase
        mode = SizesOnly(StorageLog(), self.computes)
        restart_count()
        try:
            with (
                rank_of_world(record.rank, self.world_size, self.stores[phase]),
                recorder.installed(),
                nothing_is_read(),
                mode,
            ):
                yield recorder, mode
        finally:
            gc.collect()
        if record.rank == 0:
            self.rank_0_objects[phase] = recorder.objects
        record.collectives += recorder.collectives

    def _save(self, run: Run, record: RankRecord) -> None:
        """Save through the run's own saver, whose shards are written by name and size alone."""
        run.state.iteration = run.config.batch.train_iters
        with sizes_are_written(run) as files:
            saver = CheckpointSaver(self.directory / "saved", asynchronous=False, frozen=run.state.frozen)
            start_save(saver, run.state, run.model.directory, checkpoint_card(run))
            saver.close()
        record.files = files


def _step(run: Run, record: RankRecord, recorder: Recorder, mode: SizesOnly) -> Rehearsed:
    """Train one step, and fill in the record's memory and share of the data."""
    state, log = run.state, mode.log
    if mode.computes:
        _draw_weights(run)
    balance(state.chunks, mode)
    set_newest_weight(state.chunks, run.newest_weight(0))
    reset_routing(state.chunks)
    recorder.phase = "step"
    read = _NotedDataset(run.datasets.train)
    run.datasets = dataclasses.replace(run.datasets, train=read)
    batches = next(global_batches(run))
    before = log.restart()
    with _peak_of_backward(run, log) as peak:
        result = training_step(
            state, batches, run.language_group, run.config.batch.global_batch_size, check_gradients=True
        )
    if result.agreed.not_finite:
        raise RuntimeError(f"the rehearsed {result.agreed.not_finite} is not finite")
    buffers = [buffer for chunk in state.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parameters = sum(parameter.nbytes for chunk in state.chunks for parameter in chunk.parameters())
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    record.memory = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer_bytes(run),
        "activations": peak["bytes"] - before,
    }
    record.data = _share_of_data(run, read.numbers)
    loss = result.agreed.sums.mean if mode.computes else float("nan")
    return Rehearsed(
        record=record,
        coordinates=coordinates(),
        at_peak=peak["places"],
        shape=run.model.shape,
        trains=run.stage.trains,
        bf16=run.model.config.bf16,
        distributed_optimizer=run.config.optimizer.use_distributed_optimizer or run.model.config.bf16,
        loss=loss,
    )


@contextlib.contextmanager
def _peak_of_backward(run: Run, log: StorageLog) -> Iterator[dict[str, Any]]:
    """The peak of the log when the optimizer begins: what it allocates in its first step stays."""
    optimizer, found = run.state.optimizer, dict[str, Any]()
    prepare_grads = optimizer.prepare_grads

    def prepare_and_note() -> Any:
        found.update(bytes=log.peak, places=Counter(log.at_peak))
        return prepare_grads()

    optimizer.prepare_grads = prepare_and_note
    try:
        yield found
    finally:
        optimizer.prepare_grads = prepare_grads


def optimizer_bytes(run: Run) -> int:
    """Bytes of AdamW's moments and of the copies that it updates, other than the model's own weights."""
    own = {weight.untyped_storage().data_ptr() for chunk in run.state.chunks for weight in chunk.parameters()}
    held = {}
    for part in (part.optimizer for part in run.state.optimizer.chained_optimizers if part.optimizer is not None):
        for weight in (weight for group in part.param_groups for weight in group["params"]):
            for tensor in (weight, *filter(torch.is_tensor, part.state[weight].values())):
                if tensor.numel() > 1 and tensor.untyped_storage().data_ptr() not in own:
                    held[tensor.data_ptr()] = tensor.nbytes
    return sum(held.values())


def coordinates() -> dict[str, int]:
    """Place of this rank in each parallel dimension, by Megatron's short names."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "dp": parallel_state.get_data_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "expt_dp": parallel_state.get_expert_data_parallel_rank(),
    }


class _NotedDataset(torch.utils.data.Dataset):
    """A dataset that notes which samples are read."""

    def __init__(self, dataset: TrainingDataset) -> None:
        self.dataset = dataset
        self.numbers: list[int] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        self.numbers.append(int(number))
        return self.dataset[number]


def _share_of_data(run: Run, numbers: list[int]) -> dict[str, Any]:
    """Which samples this rank has read in the first step, micro-batch by micro-batch."""
    size = run.config.batch.micro_batch_size
    return {
        "data_parallel_rank": parallel_state.get_data_parallel_rank(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
        "samples": [numbers[first : first + size] for first in range(0, len(numbers), size)],
    }


def _evaluate(run: Run, mode: SizesOnly) -> None:
    """Evaluate the first validation dataset, as the run does between steps."""
    balance(run.state.chunks, mode)
    for dataset in run.datasets.valid[:1]:
        settings = run.model.config, run.model.shape, dataset, run.language_group, run.platform.device
        evaluate_dataset(run.state.chunks, *settings, run.config.batch.micro_batch_size)


def _draw_weights(run: Run) -> None:
    generator = torch.Generator().manual_seed(run.config.data.seed)
    with torch.no_grad():
        for chunk in run.state.chunks:
            for parameter in chunk.parameters():
                values = torch.randn(parameter.shape, generator=generator) * WEIGHT_SCALE
                parameter.copy_(values if parameter.dim() > 1 else 1.0 + values)
    run.state.optimizer.reload_model_params()
