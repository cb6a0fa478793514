"""The emulation in every process that a test starts, before Megatron or Transformer Engine is imported there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BOOT = Path(__file__).parent / "boot"


def emulate() -> None:
    """Install extension and device in this process."""
    # torch.compile would look at the device's type, which stays `cpu`.
    torch._dynamo.config.disable = True
    from tests.emulation import device, extension

    device.install()
    extension.install()
    from megatron_moe_lpr.platform.cpu import internals

    internals.install()


def environment() -> dict[str, str]:
    """Environment variables with which a new Python starts on the emulated device."""
    return {"PYTHONPATH": os.pathsep.join((str(BOOT), str(ROOT)))}


@contextlib.contextmanager
def processes_on_the_device() -> Iterator[None]:
    """Python processes started inside run on the emulated device."""
    before = os.environ.get("PYTHONPATH")
    os.environ.update(environment())
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
