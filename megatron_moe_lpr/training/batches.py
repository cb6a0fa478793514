"""The global batches of a run, from the sample at which it starts or resumes."""

import itertools
from collections.abc import Iterator

from megatron.core import parallel_state

from megatron_moe_lpr.data.reading.batches import Batch, build_data_iterator
from megatron_moe_lpr.engine.micro_batches import to_device
from megatron_moe_lpr.training.setup import Run


def global_batches(run: Run) -> Iterator[list[Batch]]:
    """Return an iterator over this rank's micro-batches of each step that is left, on the model's device."""
    config, device = run.config, run.platform.device
    if run.state.iteration >= config.batch.train_iters:
        return iter(())
    micro_batches = build_data_iterator(
        run.datasets.train,
        run.state.consumed_samples,
        config.batch.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        config.data.num_workers,
        pin_memory=run.platform.on_gpus,
    )
    # `iter` with a sentinel: calls the function for each step, until no micro-batch is left.
    return iter(lambda: [to_device(part, device) for part in itertools.islice(micro_batches, run.num_microbatches)], [])
