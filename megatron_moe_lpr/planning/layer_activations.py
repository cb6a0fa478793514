"""Activations of one layer: bytes that a token keeps between forward and backward pass, and gradients of the FFN."""

from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.planning.local_activations import (
    local_attention_bytes,
    local_gradient_bytes,
    local_routing_bytes,
)
from megatron_moe_lpr.planning.planned_run import PlannedLayer, Recompute
from megatron_moe_lpr.planning.sizes import FP8_BLOCK, FP32


def kept_bytes_per_token(layer: PlannedLayer, recompute: Recompute) -> float:
    """Bytes that a token keeps in a layer between its forward and its backward pass, the layer's output included."""
    hidden = layer.run.hidden_bytes
    if recompute == "full":
        return hidden
    if not layer.run.sizes.transformer_engine and not layer.has_trained_weight_below:
        return _kept_above_attention(layer)
    attention = _attention_bytes(layer, recompute)
    if not layer.is_moe:
        return 2 * hidden + attention + (0 if recompute == "mlp" else _dense_ffn_bytes(layer))
    return _stream_bytes(layer, recompute) + attention + (0 if recompute == "moe" else _moe_bytes(layer, recompute))


def _kept_above_attention(layer: PlannedLayer) -> float:
    """Bytes that a token keeps in a local layer whose attention has no backward pass: what its router and experts need,
    the router's input and, of a norm behind them, its own."""
    inputs = 2 if layer.architecture.family.norms == "after" else 1
    return inputs * layer.run.hidden_bytes + _moe_bytes(layer, "none") if layer.has_new_experts else 0.0


def _stream_bytes(layer: PlannedLayer, recompute: Recompute) -> float:
    """Bytes that the residual stream and its norms keep in a MoE layer: inputs of both norms, and the router's input.

    Where norms stand after attention and FFN, these put out the norms' inputs, and the router's is the stream itself.
    In a parallel block there is one norm. Only norms in front of attention or FFN can be recomputed.
    """
    hidden, norms = layer.run.hidden_bytes, layer.architecture.family.norms
    inputs = hidden if norms == "shared" else 2 * hidden
    return inputs + (0 if norms == "before" and recompute == "layernorm" else hidden)


def recomputed_bytes_per_token(layer: PlannedLayer) -> float:
    """Activations recomputed before a layer's backward pass, in bytes per token."""
    recompute = layer.run.recompute
    if recompute == "full":
        return kept_bytes_per_token(layer, "none")
    if not layer.is_moe:
        return _dense_ffn_bytes(layer) if recompute == "mlp" else 0.0
    everything = _moe_bytes(layer, "none")
    kept = {"moe": 0.0, "moe_act": _moe_bytes(layer, "moe_act")}
    return everything - kept.get(recompute, everything)


def gradient_bytes(layer: PlannedLayer) -> float:
    """Bytes of a rank's gradients at the fullest moment of the FFN's backward pass, less what is freed by then.

    Weight gradients need no memory of their own: the products add them to the fp32 buffer. Of frozen experts no input
    is kept for them.
    """
    run, sizes = layer.run, layer.run.sizes
    D, F, element = layer.architecture.hidden_size, layer.architecture.ffn_hidden_size, sizes.element_bytes
    rows, ranks = run.rank_tokens, run.layout.tensor_model_parallel_size
    trained = int(ParameterKind.DENSE_FFN in layer.trains)
    if layer.is_moe:
        rows *= rows_per_token(layer)[1]
        ranks = run.layout.expert_tensor_parallel_size
        trained = layer.spread_experts if ParameterKind.EARLIER_EXPERTS in layer.trains else layer.newest_experts
        trained *= ParameterKind.NEW_EXPERTS in layer.trains
    own = (1 + _own_gradients(layer)) * run.rank_tokens * D * element
    if not sizes.transformer_engine:
        held = trained // run.layout.expert_model_parallel_size if layer.is_moe else trained
        return local_gradient_bytes(layer, rows, ranks, held) + own
    trains = trained > 0
    # FP8 copies of an operand: one by rows for the input's gradient, one by columns for the weight's.
    fp8_copies = (2 if trains else 1) if sizes.precision == "fp8" else 0
    outer, inner = rows * D * ranks, rows * F  # values of the products' wide and narrow operands
    freed = inner * _trained_share(layer) * _input_bytes(layer) if trains else 0.0
    # Of the down projection, of SwiGLU, of gate and up projection.
    down = outer * (element + fp8_copies) + inner * element
    activation = 3 * inner * element - freed
    gate_and_up = 2 * inner * fp8_copies + outer * element - freed
    return max(down, activation, gate_and_up) + own


def _own_gradients(layer: PlannedLayer) -> float:
    """Rows for each token that the new experts' backward pass finds the original expert's gradients in: those of its
    inputs and, where all rows lie in one tensor, of its outputs."""
    return 2 * rows_per_token(layer)[0] if layer.is_moe else 0.0


def rows_per_token(layer: PlannedLayer) -> tuple[float, float]:
    """Rows of the original expert and of those that EP ranks share on a rank, for each token of the rank."""
    E, K, EP = layer.num_experts, layer.run.shape.top_k, layer.run.layout.expert_model_parallel_size
    if layer.run.sizes.routing == "balanced":
        own = K / E if layer.has_expert_apart else 0.0
        return own, K - own
    # Worst case: tokens of all EP ranks choose experts of this one.
    return 0.0, EP * min(K, layer.spread_experts // EP)


def original_expert_bytes(layer: PlannedLayer) -> float:
    """Bytes of a row of the original expert: gate and up; with TP also the output, which the router's weight multiplies
    there; inputs where it trains. Without them the token, where the new experts' weights need the sorted rows that both
    lie in: on a rank that holds all experts and keeps no copy in FP8, and has no frozen ones among them, beside which
    the others' rows are copied (`model/moe/expert_groups.py`)."""
    D, F, layout = layer.architecture.hidden_size, layer.architecture.ffn_hidden_size, layer.run.layout
    element = layer.run.sizes.element_bytes
    weighted = D * element if layout.tensor_model_parallel_size > 1 else 0
    if ParameterKind.ORIGINAL_EXPERT in layer.trains:
        return 2 * F * element + weighted + (D + F) * _input_bytes(layer)
    exchanges = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size > 1
    shares = ParameterKind.NEW_EXPERTS in layer.trains and not exchanges and layer.run.sizes.precision != "fp8"
    shares = shares and layer.newest_experts == layer.spread_experts
    return 2 * F * element + weighted + (D * element if shares else 0)


def _attention_bytes(layer: PlannedLayer, recompute: Recompute) -> float:
    """Input of the QKV matrix where it trains, queries and keys before their norm, and what fused attention keeps;
    in fp32, without fused attention, the softmax."""
    if not layer.run.sizes.transformer_engine:
        return local_attention_bytes(layer, recompute)
    architecture, sizes = layer.architecture, layer.run.sizes
    element, S, H = sizes.element_bytes, sizes.seq_length, architecture.num_attention_heads
    query = output = H * architecture.head_dim
    key = value = architecture.num_query_groups * architecture.head_dim
    trains = ParameterKind.ATTENTION in layer.trains
    before = architecture.hidden_size * _input_bytes(layer) if trains else 0
    if architecture.family.qk_norm == "heads":
        before += element * (query + key)
    elif architecture.family.qk_norm == "all heads":
        # Computed by PyTorch, in fp32; where the norm trains, normalised ones too.
        before += FP32 * (query + key) * (2 if ParameterKind.NORM in layer.trains else 1)
    if sizes.precision == "fp32":
        softmax, mask = H * S, S
        return before + element * (3 * query + softmax) + mask
    statistics = FP32 * H
    # Delayed scaling keeps the output projection's input in FP8 as well.
    fp8_output = output if trains and sizes.precision == "fp8" and sizes.fp8_recipe == "delayed" else 0
    if recompute == "core_attn":
        # The values are a view of the whole QKV product, which therefore stays in memory as well.
        return before + element * (2 * (query + key) + value + (output if trains else 0)) + fp8_output
    return before + element * (query + key + value + output) + statistics + fp8_output


def _dense_ffn_bytes(layer: PlannedLayer) -> float:
    """Outputs of gate and up projection, and the inputs of all three matrices where they train."""
    D, F = layer.architecture.hidden_size, layer.architecture.ffn_hidden_size
    inputs = (D + F) * _input_bytes(layer) if ParameterKind.DENSE_FFN in layer.trains else 0
    return 2 * F * layer.run.sizes.element_bytes + inputs


def _moe_bytes(layer: PlannedLayer, recompute: Recompute) -> float:
    """Router, dispatcher, and what the experts of a token keep."""
    original, new = rows_per_token(layer)
    routing = _routing_bytes(layer, original, new)
    experts = original * original_expert_bytes(layer) + new * _new_expert_bytes(layer, recompute)
    return routing + experts + _shared_expert_bytes(layer)


def _shared_expert_bytes(layer: PlannedLayer) -> float:
    """Outputs of gate and up projection of a shared expert, its output and its gate's; inputs where it trains."""
    F, D, element = layer.shared_expert_size, layer.architecture.hidden_size, layer.run.sizes.element_bytes
    if not F:
        return 0.0
    inputs = (D + F) * _input_bytes(layer) if ParameterKind.SHARED_EXPERT in layer.trains else 0
    return (2 * F + D) * element + inputs


def _routing_bytes(layer: PlannedLayer, original: float, new: float) -> float:
    """Logits and probabilities in fp32 and choices of the router; order and weights of each copy of a token, and again
    of those that were sent."""
    if not layer.run.sizes.transformer_engine:
        return local_routing_bytes(layer, original, new)
    E, layout = layer.num_experts, layer.run.layout
    exchanges = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size > 1
    router, order = 2 * FP32 * E + E, FP32 * (2 * E + 1)
    return router + order + FP32 * (original + new) + (2 * FP32 * new if exchanges else 0)


def _new_expert_bytes(layer: PlannedLayer, recompute: Recompute) -> float:
    """Bytes of a row of a new expert: gate and up; where experts train, for their share of the rows, the token, whole
    on each ETP rank, and the down projection's input."""
    D, F, ETP = (
        layer.architecture.hidden_size,
        layer.architecture.ffn_hidden_size,
        layer.run.layout.expert_tensor_parallel_size,
    )
    product = 2 * F * layer.run.sizes.element_bytes
    if ParameterKind.NEW_EXPERTS not in layer.trains:
        return product
    activation = 0 if recompute == "moe_act" else F
    return product + _trained_share(layer) * (D * ETP + activation) * _input_bytes(layer)


def _trained_share(layer: PlannedLayer) -> float:
    """Share of the rows of the experts that EP ranks share whose experts train; in the worst case all, where there are
    such experts."""
    at_worst = layer.run.sizes.routing == "worst" and layer.newest_experts > 0
    if not layer.is_moe or ParameterKind.EARLIER_EXPERTS in layer.trains or at_worst:
        return 1.0
    return layer.newest_experts / layer.spread_experts


def _input_bytes(layer: PlannedLayer) -> float:
    """Bytes of a value in a matrix's input that is kept for the weight's gradient."""
    sizes = layer.run.sizes
    if sizes.precision != "fp8":
        return sizes.element_bytes
    return 1 + FP32 / FP8_BLOCK if sizes.fp8_recipe == "blockwise" else 1
