"""What stops a run: values that are not finite, parameters without a gradient, a rank that dies."""

import functools
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.config import OptimizerOptions
from megatron_moe_lpr.training.configuration.stages import STAGES, freeze
from megatron_moe_lpr.training.guards import GradientWatch
from megatron_moe_lpr.training.optimizer import wrap_data_parallel
from megatron_moe_lpr.training.signals import EXIT_REQUEUE
from tests.conversion.helpers import rewrite_checkpoint
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, train

PP2 = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("guards")
    return make_checkpoint(root), make_data(root)


def message_of(*arguments, **changes) -> str:
    """The error a run ends with, on every rank."""
    try:
        train(*arguments, **changes)
    except UserError as error:
        return str(error)
    return "no error"


def test_not_a_number_names_step_rank_and_layer(inputs, tmp_path):
    path = make_checkpoint(tmp_path)

    def poison(tensors):
        tensors["decoder.layers.2.self_attention.linear_proj.weight"][0, 0] = torch.nan

    rewrite_checkpoint(path, poison)
    for words in rank_pool(2).run(functools.partial(message_of, path, tmp_path / "run", inputs[1], **PP2)):
        assert words.startswith(
            "step 1: the loss is not finite, first in the output of layer 2 (counted from 0) on rank 1"
        )
    assert not (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists()


def watched_without_backward(path) -> str:
    """Only the last layer's experts get a gradient."""
    platform, layout = select_platform("cpu"), ParallelLayout()
    initialize_parallel(platform, layout)
    model = load_model(path, layout, platform)
    freeze(model.chunks, STAGES["1"])
    chunks = wrap_data_parallel(model.chunks, model.config, OptimizerOptions())
    watch = GradientWatch(chunks)
    last = chunks[0].module.decoder.layers[-1].mlp
    sum(parameter.sum() for parameter in last.parameters() if parameter.requires_grad).backward()
    with pytest.raises(UserError) as caught:
        watch.check()
    return str(caught.value)


def test_missing_gradients_are_named(inputs):
    """Three layers of one router and two matrices of each of four experts got none."""
    words = rank_pool(1).run(watched_without_backward, inputs[0])[0]
    assert words.startswith(
        "rank 0: 27 trainable parameters got no gradient in the first step, for example decoder.lay"
    )


def launch(inputs, save, *extra: str) -> subprocess.Popen:
    """`torchrun` with two ranks, long enough to be interrupted."""
    checkpoint, data = inputs
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "megatron_moe_lpr.pretrain",
    ]
    flags = {
        "stage": "1", "load": checkpoint, "save": save, "train-iters": 100000, "micro-batch-size": 1,
        "global-batch-size": 2, "seq-length": 32, "num-workers": 0, "log-interval": 1,
    }  # fmt: skip
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    command += ["--data-path", data["el"], data["hu"], "--platform", "cpu", *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "megatron_moe_lpr.pretrain" in " ".join(child.cmdline())]


def wait_for_steps(process: subprocess.Popen, save, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (save / "metrics.jsonl").exists() or len(metrics(save)) < steps:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.2)


def test_a_killed_rank_ends_the_others(inputs, tmp_path):
    process = launch(inputs, tmp_path / "run")
    wait_for_steps(process, tmp_path / "run", 2)
    victims = workers(process)
    victims[-1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in output or "Signal 9" in output
    assert not any(victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE for victim in victims)


def test_a_signal_saves_and_asks_for_another_start(inputs, tmp_path):
    """To the workers, as the launchers deliver it."""
    save = tmp_path / "run"
    process = launch(inputs, save)
    wait_for_steps(process, save, 2)
    for worker in workers(process):
        worker.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert f"exitcode  : {EXIT_REQUEUE}" in output
    assert "stopped by request" in output
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(max(metrics(save)))
