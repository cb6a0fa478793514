"""On how many ranks and nodes a run may train: where its layout and its global batch come out even."""

from collections.abc import Iterable

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.training.configuration.config import TrainingConfig


def micro_batches_on(config: TrainingConfig, ranks: int) -> int:
    """Return the micro-batches that each rank accumulates in a step where the run trains on `ranks` ranks.

    Raises:
        UserError: the ranks do not split into the run's TP, PP and EP, or the global batch does not divide.
    """
    layout = config.layout
    layout.check_world(ranks)
    count = config.batch.num_microbatches(layout.data_parallel_size(ranks))
    pipeline_ranks = layout.pipeline_model_parallel_size
    if layout.num_virtual_stages_per_pipeline_rank > 1 and count % pipeline_ranks:
        raise UserError(
            f"--num-virtual-stages-per-pipeline-rank needs the {count} micro-batches of a step to be a multiple of "
            f"--pipeline-model-parallel-size {pipeline_ranks}; change --global-batch-size or --micro-batch-size"
        )
    return count


def why_not_on(config: TrainingConfig, ranks: int) -> str | None:
    """Return why the run cannot train on `ranks` ranks; None: it can."""
    try:
        micro_batches_on(config, ranks)
    except UserError as error:
        return str(error)
    return None


def fitting_nodes(config: TrainingConfig, ranks_per_node: int, counts: Iterable[int]) -> list[int]:
    """Return those of `counts` that are numbers of nodes on which the run can train."""
    return [nodes for nodes in counts if why_not_on(config, nodes * ranks_per_node) is None]


def describe_fitting(config: TrainingConfig, ranks_per_node: int, most: int) -> str:
    """Return the numbers of nodes up to `most` on which the run can train, as the end of an error's line."""
    fitting = fitting_nodes(config, ranks_per_node, range(1, most + 1))
    return f"numbers of nodes that fit: {', '.join(map(str, fitting)) or f'none up to {most}'}"
