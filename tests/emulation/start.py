"""The emulation in every process that a test starts, before Megatron or Transformer Engine is imported there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch

WITHOUT_ENGINE = "EMULATED_WITHOUT_TRANSFORMER_ENGINE"
"""Environment variable of processes on the emulated device in which Transformer Engine cannot be imported."""
ROOT = Path(__file__).parents[2]
BOOT = Path(__file__).parent / "boot"


def emulate() -> None:
    """Install extension and device in this process, or the device alone."""
    # torch.compile would look at the device's type, which stays `cpu`.
    torch._dynamo.config.disable = True
    from tests.emulation import device, extension

    device.install()
    if os.environ.get(WITHOUT_ENGINE):
        extension.block()
    else:
        extension.install()
    from megatron_moe_lpr.platform.cpu import internals

    internals.install()


def environment(with_engine: bool = True) -> dict[str, str]:
    """Environment variables with which a new Python starts on the emulated device."""
    path = {"PYTHONPATH": os.pathsep.join((str(BOOT), str(ROOT)))}
    return path if with_engine else path | {WITHOUT_ENGINE: "1"}


@contextlib.contextmanager
def processes_on_the_device(with_engine: bool = True) -> Iterator[None]:
    """Python processes started inside run on the emulated device."""
    with patch.dict(os.environ, environment(with_engine)):
        yield
