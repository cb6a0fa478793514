"""Metrics of a run: the line that is printed, and records for metrics.jsonl, TensorBoard and Weights & Biases."""

import dataclasses
import datetime
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS
from megatron_moe_lpr.model.moe.routing_statistics import RoutingReport
from megatron_moe_lpr.parallel.every_rank import on_rank_0
from megatron_moe_lpr.training.configuration.config import LoggingOptions
from megatron_moe_lpr.training.logs.log_sinks import (
    Destination,
    Record,
    RetryingSink,
    TensorBoard,
    ThreadedSink,
    WeightsAndBiases,
)
from megatron_moe_lpr.training.logs.metrics_file import MetricsFile

METRICS_FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class IntervalMetrics:
    """Means over the steps of a log interval, losses in nats per token; speed and memory of this rank."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    language_losses: dict[str, float]
    grad_norm: float
    lr: float
    tokens_per_second: float
    flops_per_second: float
    memory_gigabytes: float
    seconds_left: float
    routing: RoutingReport | None

    def scalars(self) -> dict[str, float]:
        """Values by name, without those that are not finite, which JSON cannot hold."""
        values = {
            "lm_loss": self.loss,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "tokens_per_second": self.tokens_per_second,
            "tflops_per_second": self.flops_per_second / 1e12,
            "memory_gigabytes": self.memory_gigabytes,
            **{f"lm_loss/{language}": loss for language, loss in self.language_losses.items()},
            **(routing_scalars(self.routing) if self.routing else {}),
        }
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def line(self, stage: str, train_iters: int) -> str:
        """The line that is printed."""
        languages = " ".join(f"{name} {loss:.3f}" for name, loss in self.language_losses.items())
        # Of conversations a few samples may hold prompts alone.
        loss = f"loss {self.loss:.4f} ({languages})" if self.language_losses else "no token with a loss"
        parts = [f"stage {stage}", f"step {self.iteration:,}/{train_iters:,}", loss]
        if self.routing:
            parts.append(_routing_words(self.routing))
        parts += [f"grad norm {self.grad_norm:.3f}", f"lr {self.lr:.2e}"]
        parts += [f"{self.tokens_per_second:,.0f} tokens/s", f"{self.flops_per_second / 1e12:.2g} TFLOP/s"]
        parts.append(f"{datetime.timedelta(seconds=round(self.seconds_left))} left")
        return " | ".join(parts)


def routing_scalars(routing: RoutingReport) -> dict[str, float]:
    """Losses of the routers; probability of the original expert and share of tokens with it in their top k, by language
    group, over all layers and by layer. Of a mixture base, of all its experts together (`RoutingReport`)."""
    values = {
        "load_balancing_loss": routing.load_balancing.nanmean().item(),
        "lpr_loss": routing.mean_over_layers(routing.lpr_loss, "original"),
    }
    for column, group in enumerate(LANGUAGE_GROUPS):
        values[f"expert0_probability/{group}"] = routing.mean_over_layers(routing.probability, group)
        values[f"expert0_top_k_share/{group}"] = routing.mean_over_layers(routing.top_k_share, group)
        for layer in range(len(routing.tokens)):
            values[f"expert0_probability/{group}/layer{layer}"] = routing.probability[layer, column].item()
            values[f"expert0_top_k_share/{group}/layer{layer}"] = routing.top_k_share[layer, column].item()
    return values


def _routing_words(routing: RoutingReport) -> str:
    words = [f"balance {routing.load_balancing.nanmean().item():.3f}"]
    lpr = routing.mean_over_layers(routing.lpr_loss, "original")
    if math.isfinite(lpr):
        words.append(f"LPR {lpr:.4f}")
    for group in LANGUAGE_GROUPS:
        probability = routing.mean_over_layers(routing.probability, group)
        if math.isfinite(probability):
            words.append(f"{'expert 0' if routing.original_experts == 1 else 'base experts'} {group} {probability:.2f}")
    return " ".join(words)


class MetricsWriter:
    """Writes records on rank 0 only. A destination that fails costs a warning, never a step (`log_sinks`)."""

    def __init__(
        self,
        options: LoggingOptions,
        directory: Path,
        run_name: str,
        iteration: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open all destinations.

        Args:
            directory: the run's directory, for metrics.jsonl.
            iteration: step that the run resumes from; what an earlier start logged of later steps counts no more.
            settings: the run's settings by name, for Weights & Biases and, as one text, TensorBoard.
        """
        self.enabled = dist.get_rank() == 0
        self.sinks: list[RetryingSink | ThreadedSink] = []
        self._evaluated: set[str] = set()
        if not self.enabled:
            return
        self.sinks.append(RetryingSink(str(directory / METRICS_FILE), lambda: self._metrics_file(directory, iteration)))
        if options.tensorboard_dir:
            path = options.tensorboard_dir
            self.sinks.append(
                ThreadedSink(f"--tensorboard-dir {path}", lambda: TensorBoard(path, iteration, settings or {}))
            )
        if options.wandb_project:
            project = options.wandb_project
            open_project = functools.partial(WeightsAndBiases, project, run_name, directory, settings or {})
            self.sinks.append(ThreadedSink(f"--wandb-project {project}", open_project))

    def _metrics_file(self, directory: Path, iteration: int) -> Destination:
        file = MetricsFile(directory / METRICS_FILE, iteration)
        self._evaluated = file.evaluated
        return _JSONLines(file)

    def evaluated(self) -> set[str]:
        """Validation datasets with a logged result of the step that the run resumes from. Every rank must call it."""
        return on_rank_0(lambda: self._evaluated)

    def say(self, text: str) -> None:
        """Print a line on rank 0, with the time of day."""
        if self.enabled:
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    def write(self, kind: str, iteration: int, values: dict[str, Any]) -> None:
        """Write one record as a JSON line, and its numbers to TensorBoard and Weights & Biases."""
        for sink in self.sinks:
            sink.write(Record(kind, iteration, values))

    def flush(self) -> None:
        """Wait until all records are written, only for a while where a destination hangs."""
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        """Write the records that wait, and close all destinations."""
        for sink in self.sinks:
            sink.close()


class _JSONLines:
    """metrics.jsonl as a destination of records."""

    def __init__(self, file: MetricsFile) -> None:
        self.file = file

    def write(self, record: Record) -> None:
        self.file.append(record.kind, record.iteration, dict(record.values))

    def close(self) -> None:
        """Do nothing: every record is in the file."""
