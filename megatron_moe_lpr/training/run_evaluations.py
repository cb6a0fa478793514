"""Evaluations of a run: which validation datasets are due after a step, and their losses."""

from collections.abc import Callable

from megatron_moe_lpr.data.reading.validation_dataset import ValidationDataset
from megatron_moe_lpr.evaluation.losses import DatasetLoss, evaluate_dataset
from megatron_moe_lpr.training.setup import Run


class RunEvaluations:
    """Evaluates the validation datasets of a run. Every rank makes one and calls its methods in the same order."""

    def __init__(self, run: Run, evaluated: set[str]) -> None:
        """Start after the run's current step.

        Args:
            evaluated: names of the datasets that were evaluated after this step already: a signal or a kill may have
                interrupted the evaluation.
        """
        self.run, self.evaluated = run, evaluated

    def begin_step(self) -> None:
        """Note that the weights change, so that no dataset has a result of them."""
        self.evaluated = set()

    def missing(self) -> list[ValidationDataset]:
        """Return the datasets that are due after the current step and were not evaluated yet."""
        config, iteration = self.run.config, self.run.state.iteration
        interval = config.logging.eval_interval
        is_due = iteration >= config.batch.train_iters or bool(interval and iteration % interval == 0)
        if not is_due or not iteration:
            return []
        return [dataset for dataset in self.run.datasets.valid if dataset.name not in self.evaluated]

    def evaluate(self, dataset: ValidationDataset, after_pass: Callable[[], bool]) -> DatasetLoss | None:
        """Evaluate one dataset. None: a rank is asked to stop; see `evaluation.losses.evaluate_dataset`."""
        run = self.run
        result = evaluate_dataset(
            run.state.chunks,
            run.model.config,
            run.model.shape,
            dataset,
            run.language_group,
            run.platform.device,
            run.config.batch.micro_batch_size,
            after_pass,
        )
        if result is not None:
            self.evaluated.add(result.name)
        return result
