"""The table of dense families: what each computes, what its absent fields mean, and which stock MoE it becomes."""

import dataclasses
from typing import Any, Literal

from megatron_moe_lpr.model.configuration.rope_parameters import DEFAULT_THETA

QKNorm = Literal["heads", "all heads"]
Norms = Literal["before", "after", "shared"]
Window = Literal["none", "all layers", "some layers"]


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """Constants that a model multiplies by, at the four places where families have one."""

    embedding: float = 1.0
    """Of the embedding's output."""
    attention: float | None = None
    """Of the products of queries and keys; None: 1 / sqrt(head dimension)."""
    residual: float = 1.0
    """Of what attention and FFN add to the residual stream."""
    logits: float = 1.0
    logits_divisor: float = 1.0

    @property
    def logits_factor(self) -> float:
        """Factor of the logits."""
        return self.logits / self.logits_divisor


NO_MULTIPLIERS = Multipliers()


@dataclasses.dataclass(frozen=True)
class Family:
    """One line of the table: a dense architecture of transformers and the stock MoE architecture that it becomes."""

    name: str
    """The `model_type` of the dense checkpoint."""
    architecture: str
    """The transformers class of the dense checkpoint."""
    moe_model_type: str
    """The `model_type` of the stock architecture that holds the upcycled model."""
    moe_architecture: str
    """The transformers class of the upcycled model."""

    # What the family computes otherwise than Llama.
    qkv_bias: bool = False
    """Query, key and value projections have a bias."""
    qk_norm: QKNorm | None = None
    """Queries and keys are normalised: those of each head by themselves, or those of all heads as one vector."""
    norms: Norms = "before"
    """Attention and FFN each normalise their input (`before`) or their output (`after`), or both read one normalised
    input and their outputs are added together (`shared`, the parallel block)."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """A LayerNorm has a weight and no bias."""
    rotary_interleaved: bool = False
    """The rotary embedding turns neighbouring dimensions, not those half a head apart."""
    window: Window = "none"
    """Which layers have a sliding window. Where only some have one, the others have no rotary embedding."""
    multipliers: tuple[tuple[str, str, float], ...] = ()
    """Field of `Multipliers`, field of `config.json`, and its value where absent."""

    # What absent fields of `config.json` mean, and fields of which one value alone is supported.
    explicit_head_dim: int | None = None
    """The head dimension; None: hidden size / heads."""
    groups_may_be_absent: bool = False
    """An absent `num_key_value_heads` means one group for each head; otherwise the field is required."""
    norm_epsilon: tuple[str, float] = ("rms_norm_eps", 1e-6)
    """Name of the field, and its value where absent."""
    rope_theta: float = DEFAULT_THETA
    rope_types: tuple[str, ...] = ()
    """Types of rotary embedding that transformers' class of the family computes; empty: all that are supported here."""
    tied: bool = False
    """Embedding and output layer are one matrix."""
    default_window: int | None = None
    """`sliding_window`; null in the file means no window."""
    fixed: tuple[tuple[str, Any], ...] = ()
    """Fields that must have this value or be absent."""


GRANITE_MULTIPLIERS = (
    ("embedding", "embedding_multiplier", 1.0),
    ("attention", "attention_multiplier", 1.0),
    ("residual", "residual_multiplier", 1.0),
    ("logits_divisor", "logits_scaling", 1.0),
)

PARALLEL_BLOCK: dict[str, Any] = {
    "moe_model_type": "cohere2_moe",
    "moe_architecture": "Cohere2MoeForCausalLM",
    "norms": "shared",
    "normalization": "LayerNorm",
    "rotary_interleaved": True,
    "multipliers": (("logits", "logit_scale", 0.0625),),
    "groups_may_be_absent": True,
    "norm_epsilon": ("layer_norm_eps", 1e-5),
    "tied": True,
}
"""What Cohere's two dense families have in common."""

FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2", "Qwen2ForCausalLM", "qwen2_moe", "Qwen2MoeForCausalLM", qkv_bias=True),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3_moe", "Qwen3MoeForCausalLM", qk_norm="heads", explicit_head_dim=128),
        Family("llama", "LlamaForCausalLM", "mixtral", "MixtralForCausalLM", groups_may_be_absent=True),
        Family(
            "mistral",
            "MistralForCausalLM",
            "mixtral",
            "MixtralForCausalLM",
            window="all layers",
            default_window=4096,
        ),
        Family(
            "seed_oss",
            "SeedOssForCausalLM",
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            qkv_bias=True,
            explicit_head_dim=128,
            fixed=(("attention_bias", True), ("attention_out_bias", False)),
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            "mixtral",
            "MixtralForCausalLM",
            window="all layers",
            groups_may_be_absent=True,
            norm_epsilon=("rms_norm_eps", 1e-5),
            rope_types=("default",),
            fixed=(("attention_bias", False),),
        ),
        Family(
            "granite",
            "GraniteForCausalLM",
            "granitemoe",
            "GraniteMoeForCausalLM",
            multipliers=GRANITE_MULTIPLIERS,
            groups_may_be_absent=True,
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            "flex_olmo",
            "FlexOlmoForCausalLM",
            qk_norm="all heads",
            norms="after",
            groups_may_be_absent=True,
            norm_epsilon=("rms_norm_eps", 1e-5),
        ),
        Family(
            "helium",
            "HeliumForCausalLM",
            "mixtral",
            "MixtralForCausalLM",
            explicit_head_dim=128,
            norm_epsilon=("rms_norm_eps", 1e-8),
            rope_theta=100000.0,
        ),
        Family(
            "ernie4_5",
            "Ernie4_5ForCausalLM",
            "mixtral",
            "MixtralForCausalLM",
            explicit_head_dim=128,
            norm_epsilon=("rms_norm_eps", 1e-5),
            rope_theta=500000.0,
            tied=True,
            fixed=(("use_bias", False),),
        ),
        Family("cohere", "CohereForCausalLM", rope_theta=500000.0, fixed=(("use_qk_norm", False),), **PARALLEL_BLOCK),
        Family("cohere2", "Cohere2ForCausalLM", window="some layers", default_window=4096, **PARALLEL_BLOCK),
    )
}

MIXTURES = {
    family.name: family
    for family in (
        Family(
            "mixtral",
            "MixtralForCausalLM",
            "mixtral",
            "MixtralForCausalLM",
            window="all layers",
            norm_epsilon=("rms_norm_eps", 1e-5),
            rope_theta=1e6,
        ),
        Family(
            "granitemoe",
            "GraniteMoeForCausalLM",
            "granitemoe",
            "GraniteMoeForCausalLM",
            multipliers=GRANITE_MULTIPLIERS,
            groups_may_be_absent=True,
            fixed=(("attention_bias", False),),
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            "olmoe",
            "OlmoeForCausalLM",
            qk_norm="all heads",
            groups_may_be_absent=True,
            norm_epsilon=("rms_norm_eps", 1e-5),
            fixed=(("attention_bias", False), ("clip_qkv", None)),
        ),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", "qwen2_moe", "Qwen2MoeForCausalLM", qkv_bias=True),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3_moe", "Qwen3MoeForCausalLM", qk_norm="heads"),
    )
}
"""Base models that are mixtures; `moe_model_type` is their own, since a model with more experts is of the same
architecture. What they have beside a dense family's fields: `mixtures.py`."""

_POSITIONS = "it scales queries by their position from 16,384 on, which no stock mixture of experts does"
_TWO_ROPES = "it has two kinds of rotary embedding, and no stock mixture of experts has both"
_TWO_NORMS = "its own mixture block has two norms in a row behind the experts, which equal the FFN's one only nearly"
REFUSED = {
    "apertus": "its activation, xIELU, is in no stock mixture of experts",
    "gemma3": _TWO_ROPES,
    "gemma3_text": _TWO_ROPES,
    "gemma4": _TWO_NORMS,
    "gemma4_text": _TWO_NORMS,
    "olmo3": "most of its layers have a window and a rotary embedding of their own, and all of FlexOlmo's are alike",
    "smollm3": "some of its layers have neither rotary embedding nor window, and no stock mixture of experts has such",
    "ministral3": _POSITIONS,
    "mistral3": f"it is a model of pictures and text; as to its text model, {_POSITIONS}",
}
"""Why a `model_type` that users ask for cannot be exact."""
