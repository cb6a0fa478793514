"""How a global batch is cut into micro-batches."""

from megatron_moe_lpr.errors import UserError


def num_microbatches(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> int:
    """Micro-batches that a rank accumulates in one step.

    Raises:
        UserError: the global batch does not divide.
    """
    together = micro_batch_size * data_parallel_size
    if global_batch_size % together:
        raise UserError(
            f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size "
            f"{micro_batch_size} x {data_parallel_size} data-parallel ranks = {together}"
        )
    return global_batch_size // together
