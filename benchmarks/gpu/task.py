"""A measurement of a training step, as the parent hands it to a process of its own."""

import dataclasses
import json
from typing import Any, Literal

HIDDEN, FFN, VOCABULARY, LAYERS, EXPERTS, TOP_K = 2048, 5504, 151936, 24, 6, 2
"""Qwen1.5-1.8B, five new experts a layer, as the paper has it."""
TRAINED_BYTES, FROZEN_BYTES = 18, 2
"""Of a parameter in bf16: the weight, and where it trains the fp32 gradient, weight and two moments."""
USABLE = 0.8
"""Share of a device's memory for parameters; the rest is for activations, logits and the allocator."""


@dataclasses.dataclass(frozen=True)
class StepTask:
    """A step to measure."""

    stage: Literal["1", "2"]
    transformer_impl: Literal["local", "transformer_engine"]
    stock: bool = False
    """Megatron's own MoE layer instead of this project's."""
    quick: bool = False
    """Tiny sizes, to try the program."""
    fp32: bool = False
    layers: int = LAYERS
    micro_batch_size: int = 4
    micro_batches: int = 2
    seq_length: int = 1024

    @property
    def name(self) -> str:
        """What a row of the table is called."""
        layer = "Megatron's MoE layer" if self.stock else "MoE-LPR"
        return f"stage {self.stage}, {self.transformer_impl}, {layer}"

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        common = {"model_type": "qwen2", "tie_word_embeddings": False, "max_position_embeddings": 32768}
        if self.quick:
            sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        else:
            sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCABULARY}
            heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
        fields = {"num_hidden_layers": self.layers, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu"}
        return common | sizes | heads | fields

    def smaller(self) -> "StepTask | None":
        """The task to try after this one did not fit into memory: half the micro-batch, then half the layers."""
        if self.micro_batch_size > 1:
            return dataclasses.replace(self, micro_batch_size=self.micro_batch_size // 2)
        if self.layers > 1:
            return dataclasses.replace(self, layers=self.layers // 2)
        return None

    def fitted(self, device_bytes: float) -> "StepTask":
        """The task with as many layers as the parameters and the optimizer's state leave room for."""
        if self.quick:
            return self
        task = self
        while task.layers > 1 and task.parameter_bytes() > USABLE * device_bytes:
            task = dataclasses.replace(task, layers=task.layers // 2)
        return task

    def parameter_bytes(self) -> float:
        """Bytes of weights, gradients and optimizer. Megatron's layer trains the original expert's copy too."""
        expert = 3 * HIDDEN * FFN * self.layers
        trained = expert * ((EXPERTS if self.stock else EXPERTS - 1) if self.stage == "1" else 0)
        everything = EXPERTS * expert + 4 * HIDDEN**2 * self.layers + 2 * VOCABULARY * HIDDEN
        more = 2 if self.fp32 else 0  # bytes of a weight beyond bf16's
        return trained * (TRAINED_BYTES - FROZEN_BYTES) + everything * (FROZEN_BYTES + more)

    def dumps(self) -> str:
        """The task as text of one line."""
        return json.dumps(dataclasses.asdict(self))
