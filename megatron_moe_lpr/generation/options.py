"""Options of text generation: flags of `moe-lpr generate`. Imports neither torch nor Megatron, for a fast --help."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Seed
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import PlatformName

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model generates, and how it is computed."""

    load: Path | None = None
    """Checkpoint directory, dense or MoE, or one iteration in it."""
    hf: Path | None = None
    """Instead of --load: directory of an export or another Hugging Face model, or its name on the hub, run by
    transformers' own `generate`."""
    tokenizer: Path | None = None
    """Directory of a tokenizer. Default: the model's own."""
    chat_template: Path | None = None
    """File with a chat template (Jinja) to use in place of the tokenizer's own."""
    bf16: bool = False
    """Compute in bfloat16. Default: what the last run computed in, or the model's own dtype; for a float16 one
    bfloat16. CPUs without bf16 instructions compute in fp32 by default."""
    fp32: bool = False
    """Compute in fp32."""
    layout: tyro.conf.OmitArgPrefixes[ParallelLayout] = dataclasses.field(default_factory=ParallelLayout)
    platform: PlatformName = "auto"
    """Where to run. auto: CUDA if there is a device. The layers are PyTorch's, on GPUs too."""
    base_checkpoint: Path | None = None
    """For a --load of --save-trainable-only: directory of the checkpoint that its run started from, if it has moved."""
    verify: bool = True
    """Compare the checkpoint's files with their checksums before use."""
    distributed_timeout_minutes: Annotated[PositiveInt, tyro.conf.arg(name="distributed-timeout-minutes")] = 10
    """A collective operation that takes longer ends the command; so does nine tenths of this time without progress."""

    def __post_init__(self) -> None:
        if (self.load is None) == (self.hf is None):
            raise UserError("give --load CHECKPOINT or --hf DIRECTORY, one of them")
        if self.hf is not None and self.layout != ParallelLayout():
            raise UserError("--hf: transformers runs in one process; a layout needs --load")
        if self.layout.context_parallel_size > 1:
            raise UserError(
                f"--context-parallel-size {self.layout.context_parallel_size}: a step of generation reads one token of "
                "each text, which ranks cannot share; leave it at 1"
            )
        if self.bf16 and self.fp32:
            raise UserError("--bf16 and --fp32: give one of them")

    @property
    def dtype(self) -> "torch.dtype | None":
        """Dtype that a flag asks for; None: no flag does."""
        from megatron_moe_lpr.model.configuration.dtype import requested_dtype

        return requested_dtype(self.bf16, self.fp32)


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """What the model continues; without these flags standard input."""

    prompt: str | None = None
    """Text to continue; with --chat what a user says."""
    prompts: Path | None = None
    """File of prompts: one a line, or JSON lines (.jsonl) with `prompt`, or with `messages` and perhaps `tools`. The
    output is JSON lines."""
    messages: Path | None = None
    """JSON file of one conversation: a list of messages with `role` and `content`, or an object with `messages` and
    perhaps `tools`. The model gives the next answer."""
    chat: bool = False
    """Prompts are what a user says, and go through the tokenizer's chat template. In a terminal, without a prompt: a
    conversation; Ctrl-D ends it."""

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "prompts", "messages") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(f'--{name}' for name in given)}: give one of them")


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. Without --temperature, --top-k and --top-p always the most likely one (greedy)."""

    num_tokens_to_generate: PositiveInt = 256
    """Largest number of tokens that are added. A token that ends a text ends it earlier (`eos_token_id` of
    generation_config.json, the tokenizer's, with a chat template the one that ends an answer), and so does the last of
    the model's positions."""
    temperature: NonNegativeFloat | None = None
    """Divides the logits before a token is drawn; 0: greedy. Default, where another of these flags is given: 1."""
    top_k: NonNegativeInt | None = None
    """Draw among the k most likely tokens; 1: greedy, 0: among all."""
    top_p: Annotated[float, Range(0.0, 1.0)] | None = None
    """Draw among the most likely tokens that together have this probability; 0 or 1: among all."""
    seed: Seed = 1234
    """Seed of the draws: the same seed and prompt give the same text, at every layout but for rounding."""
    inference_max_requests: PositiveInt = 8
    """Prompts that are continued at once (--load)."""

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        given = (self.temperature, self.top_k, self.top_p)
        return all(value is None for value in given) or self.temperature == 0 or self.top_k == 1


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """All options of `moe-lpr generate`."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    prompts: tyro.conf.OmitArgPrefixes[PromptOptions]
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions]
