"""Commands on the ranks of a pool that end in an error line, and what it says."""

from pathlib import Path

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.checkpoint import evaluate_checkpoint
from megatron_moe_lpr.evaluation.options import EvaluationOptions
from tests.training.runs import train


def train_outcome(*arguments, **changes) -> str | None:
    """On every rank: the error that a run ends in, None where it ends well."""
    try:
        train(*arguments, **changes)
    except UserError as error:
        return str(error)
    return None


def evaluation_outcome(load: Path, data: dict[str, str], verify: bool = True) -> str | None:
    """On every rank: the error that an evaluation ends in, None where it ends well."""
    plan = EvaluationOptions(load, list(data.values()), ["en"], 32, 2, platform="cpu", verify=verify)
    try:
        evaluate_checkpoint(plan)
    except UserError as error:
        return str(error)
    return None
