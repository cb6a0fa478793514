"""The device of these tests: real GPUs with NCCL, or the emulated one over gloo. What differs between them is here."""

import dataclasses
import importlib.util
import os

import torch

from tests.emulation import extension

EMULATED = extension.is_available()
LOCAL = os.environ.get("TRANSFORMER_IMPL") == "local" or importlib.util.find_spec("transformer_engine") is None
"""All tests run on layers of PyTorch alone: Transformer Engine is not installed, or TRANSFORMER_IMPL=local says so."""


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """Largest relative errors, in the norm of logits or of all gradients together."""

    fp32: float
    """fp32 against the CPU platform, and a layout against one rank."""
    bf16_layout: float
    """bf16, a layout against one rank: other sums round otherwise, and near ties are routed otherwise."""
    fp8: float
    """FP8 with routing held fixed, where a layout quantises other tensors: TP splits them, and with EP an expert meets
    the tokens of several ranks at once. Two roundings, each 11% from fp32, lie sqrt(2) times that apart."""


# The emulated ones stand a little above what is measured; those of GPUs are chosen, no GPU has been seen.
TOLERANCES = (
    Tolerances(fp32=2e-6, bf16_layout=0.03, fp8=0.16) if EMULATED else Tolerances(fp32=1e-4, bf16_layout=0.06, fp8=0.2)
)


def count() -> int:
    """Devices a test may use; the emulated ones share this machine's cores."""
    return 4 if EMULATED else torch.cuda.device_count()


def is_present() -> bool:
    """Whether there is a device."""
    built_for_it = torch.version.cuda is not None or torch.version.hip is not None
    return EMULATED or (built_for_it and torch.cuda.is_available())
