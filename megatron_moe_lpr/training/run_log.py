"""What a run logs, as callbacks: lines for people, records for metrics.jsonl, TensorBoard and Weights & Biases."""

from megatron_moe_lpr.checkpoint.saving.saver import Saved
from megatron_moe_lpr.data.labels import dataset_labels
from megatron_moe_lpr.evaluation.losses import DatasetLoss
from megatron_moe_lpr.training.callbacks import Callback, Step
from megatron_moe_lpr.training.logs.loss_watch import LossWatch
from megatron_moe_lpr.training.logs.metrics import MetricsWriter, routing_scalars
from megatron_moe_lpr.training.setup import Run


class RunLog(Callback):
    """Logs steps, evaluations and saves."""

    def __init__(self, run: Run, writer: MetricsWriter) -> None:
        self.writer, self.stage = writer, run.stage.name
        self.train_iters, self.save = run.config.batch.train_iters, run.config.checkpoint.save
        valid = run.datasets.valid
        labels = dataset_labels([(dataset.name, dataset.language) for dataset in valid])
        self.labels = {dataset.name: label for dataset, label in zip(valid, labels, strict=True)}
        """Name of the curve of each validation dataset, by the dataset's name."""

    def on_step(self, step: Step) -> None:
        """At log steps, print a line and write a record."""
        metrics = step.metrics
        if metrics is None:
            return
        self.writer.say(metrics.line(self.stage, self.train_iters))
        counters = {"consumed_samples": metrics.consumed_samples, "consumed_tokens": metrics.consumed_tokens}
        self.writer.write("train", metrics.iteration, counters | metrics.scalars())

    def on_evaluation(self, iteration: int, result: DatasetLoss) -> None:
        """Print a line and write a record with the dataset's loss."""
        bits = f", {result.bits_per_byte:.4f} bits per byte" if result.bits_per_byte is not None else ""
        mass = (
            f", {result.new_token_mass:.4f} of the probability on new tokens"
            if result.new_token_mass is not None
            else ""
        )
        name = f"validation {result.language} ({result.name})"
        self.writer.say(f"step {iteration:,} {name}: loss {result.loss:.4f}{bits}{mass}, {result.tokens:,} tokens")
        values = {"dataset": result.name, "language": result.language, "tokens": result.tokens}
        if result.tokens:  # a few samples of conversations may hold prompts alone
            values["lm_loss"] = result.loss
        if result.bits_per_byte is not None:
            values["bits_per_byte"] = result.bits_per_byte
        if result.new_token_mass is not None:
            values["new_token_mass"] = result.new_token_mass
        if result.routing:
            scalars = routing_scalars(result.routing)
            values |= {name: value for name, value in scalars.items() if value == value}
        self.writer.write(f"valid/{self.labels[result.name]}", iteration, values)

    def on_save(self, saved: Saved) -> None:
        """Print how long the save took."""
        self.writer.say(
            f"saved step {saved.iteration:,} to {self.save} in {saved.seconds:.1f} s, "
            f"of which training waited {saved.stalled:.1f} s"
        )


class LossWarnings(Callback):
    """Warns of losses that jump or climb."""

    def __init__(self, writer: MetricsWriter) -> None:
        self.writer, self.watch = writer, LossWatch()

    def on_step(self, step: Step) -> None:
        """Print the warning of `LossWatch`, if the loss gives reason for one."""
        if warning := self.watch.add(step.loss):
            self.writer.say(f"warning: step {step.iteration:,}: {warning}")
