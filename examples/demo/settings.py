"""The demo's settings. Each can be changed by an environment variable of its name: `STAGE1_ITERS=1000 make demo`."""

import dataclasses
import os
import types
import typing
from pathlib import Path

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


def _has_bf16() -> bool:
    """Return whether the processor has bf16 instructions: with them bf16 is faster than fp32, without them slower."""
    try:
        return bool(BF16_INSTRUCTIONS & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return False


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a target of the demo. docs/experiments.md lists other values that were tried."""

    runs: Path = Path("runs/demo")
    """Directory of all output."""
    data: Path | None = None
    """Directory for datasets. Default: RUNS/data."""
    base: Path = Path("data/base_model")
    """Hugging Face directory of the dense model, which knows the original languages."""
    tokenizer: Path | None = None
    """Directory of the tokenizer of all datasets. Default: the base model's."""
    corpus: Path = Path("data/help_corpus")
    original: tuple[str, ...] = ("en", "es", "zh")
    expanded: tuple[str, ...] = ("el", "hu", "tr")
    seed: int = 1234
    seeds: tuple[str, ...] = ("1234", "1235")
    """Seeds of the paper's table, each with its own runs."""
    ranks: int = min(CORES, 2)
    precision: str = "--bf16" if _has_bf16() else "--fp32"

    experts: int = 5
    moe_layers: str = "[0]+[1]*3"
    """Layers with experts. Layer 0 stays dense: its router cannot separate the languages."""
    inserted_blocks: int = 2
    """Inserted blocks of block expansion (LLaMA-Pro)."""
    length: int = 256
    """Tokens of a sequence. A step has batch x length tokens."""
    stage1_iters: int = 280
    stage1_batch: int = 8
    stage1_lr: str = "3e-3"
    stage2_iters: int = 1200
    stage2_batch: int = 2
    stage2_lr: str = "5e-3"
    lora_lr: str = "5e-3"
    instruct_iters: int = 280
    """Steps that make an instruct model of the base model."""
    sft_iters: int = 140
    """Steps on conversations of the new languages."""
    instruct_lr: str = "1e-3"
    new_tokens: int = 2000
    """Tokens that the target `vocabulary` adds to the base model's 1,024."""
    iters: int = 2000
    """Steps that train the base model itself."""
    replay: str = "replay"
    """Name of the replay's datasets."""
    replay_documents: int = 10
    replays: tuple[str, ...] = ("1", "3", "5", "11", "52")
    """Documents of each original language in the reviews of `scaling`: about 0.03%, 0.1%, 0.4%, 1% and 3% of stage 1
    over the whole corpus; the documents are of very different lengths."""
    validation_documents: int = 40
    full: Path = Path("runs/full")
    """Directory of the target `full`, from which `scaling` starts."""

    @property
    def datasets(self) -> Path:
        """Directory of the datasets."""
        return self.data or self.runs / "data"

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages, original ones first."""
        return (*self.original, *self.expanded)


def read_settings(**defaults: object) -> Settings:
    """Return the settings: the environment's values, else the target's own defaults.

    Args:
        defaults: fields of Settings in which the target differs.
    """
    hints = typing.get_type_hints(Settings)
    given = {name: _parse(kind, os.environ[name.upper()]) for name, kind in hints.items() if name.upper() in os.environ}
    return Settings(**{**defaults, **given})


def _parse(kind: typing.Any, text: str) -> object:
    if kind == tuple[str, ...]:
        return tuple(text.split())
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    try:
        return kind(text)
    except ValueError:
        raise SystemExit(f"error: {text!r} in the environment: {kind.__name__} expected") from None
