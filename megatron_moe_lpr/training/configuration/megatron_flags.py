"""Megatron's flags that a run does not take, each with the reason that an error line gives."""

from collections.abc import Collection, Sequence

from megatron_moe_lpr.errors import UserError

_CHECKPOINT = "is read from the checkpoint of --load; it is chosen at moe-lpr import"
_EXACT = "does not go with exports: no stock architecture has it, and step 0 would not be the dense model; leave it out"
_PAPER = "is no part of the method, whose losses are --load-balancing-coeff and --lpr-loss-coeff; leave it out"
_DROPS = "would drop tokens, and each token reaches all experts it chooses; leave it out"
_SHARED = "is for a shared expert, and the original expert is routed; leave it out"
_ALWAYS = "is always so here; leave it out"
_KERNELS = "follows from what is installed (docs/gpu.md); leave it out"
_OFFLOAD = (
    "is not offered: it was never emulated beside the layer that holds the original expert; use --recompute-granularity"
)
_FSDP = (
    "is not offered: the distributed optimizer is what freezes and resumes to the bit; use --use-distributed-optimizer"
)
_RESUME = "is not needed: --load gives weights alone, and --save resumes a run with its optimizer; leave it out"
# models/gpt/fine_grained_callables.py `submodule_attn_forward`
_COMBINED = (
    "is not offered: Megatron's combined schedule calls parts of its own MoE layer, without the language tags of the "
    "tokens and without the original expert; use --original-expert-overlap"
)
# transformer/transformer_layer.py `_te_cuda_graph_replay`
_GRAPH = (
    "is not offered: a layer that Megatron replays calls its MoE layer without the language tags of the tokens, and "
    "so without the LPR loss; no GPU has captured a layer of this project"
)
_STATIC = "is not offered: Megatron's fixed buffers need a capacity, which would drop tokens; leave it out"

_REASONS: dict[str, str] = {
    # The router.
    "moe-router-load-balancing-type": "is the paper's loss alone, whose weight is --load-balancing-coeff; leave it out",
    "moe-aux-loss-coeff": "is named --load-balancing-coeff, the mean over layers of N * sum f_i P_i",
    "moe-z-loss-coeff": f"{_PAPER} (Megatron's z-loss would also change with TP)",
    "moe-input-jitter-eps": "would send tokens away from the frozen original expert by chance; leave it out",
    "moe-router-dtype": "is fp32 always, in every format of the model; leave it out",
    "moe-router-score-function": "is softmax: the LPR loss is -log of its probability, and exports compute it",
    "moe-router-pre-softmax": "follows from the checkpoint's experts per token: before the choice for 1, else after it",
    "moe-router-topk": _CHECKPOINT,
    "moe-router-topk-limited-devices": "would decide by layout which experts a token may choose; leave it out",
    "moe-router-topk-scaling-factor": _EXACT,
    "moe-router-num-groups": _EXACT,
    "moe-router-group-topk": _EXACT,
    "moe-router-enable-expert-bias": (
        "would choose experts by other numbers than the probabilities that the LPR loss trains, and exports have no "
        "bias; use --load-balancing-coeff"
    ),
    "moe-router-bias-update-rate": "is for --moe-router-enable-expert-bias, which is not offered; leave it out",
    "moe-router-force-load-balancing": "would choose experts by chance, for benchmarks only; leave it out",
    "moe-router-force-biased": "would choose experts by chance, for benchmarks only; leave it out",
    "moe-router-padding-for-quantization": "is not needed: rows are aligned for FP8 where the recipe needs it",
    "moe-router-padding-for-fp8": "is not needed: rows are aligned for FP8 where the recipe needs it",
    "moe-router-quantile-balancing-ema": "is for a balancing that is not offered; leave it out",
    "moe-enable-routing-replay": "is for reinforcement learning; leave it out",
    "moe-per-layer-logging": "is not needed: metrics.jsonl has the routing of each layer; leave it out",
    # Experts and their tokens.
    "num-experts": _CHECKPOINT,
    "moe-layer-freq": _CHECKPOINT,
    "moe-ffn-hidden-size": _CHECKPOINT,
    "moe-expert-capacity-factor": _DROPS,
    "moe-token-dropping": _DROPS,
    "moe-token-drop-policy": _DROPS,
    "moe-pad-expert-input-to-capacity": _DROPS,
    "moe-expert-rank-capacity-factor": _DROPS,
    "moe-shared-expert-intermediate-size": _SHARED,
    "moe-shared-expert-overlap": "is named --original-expert-overlap, for the original expert",
    "moe-shared-expert-gate": _SHARED,
    "moe-latent-size": _EXACT,
    "moe-apply-probs-on-input": _EXACT,
    "moe-use-upcycling": "is what moe-lpr import does, before training; leave it out",
    "moe-grouped-gemm": _ALWAYS,
    "moe-layer-recompute": "is --recompute-granularity selective --recompute-modules moe",
    "moe-enable-deepep": "is --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep",
    "moe-deepep-num-sms": "is not offered: DeepEP was never run; leave it at Megatron's value",
    "moe-hybridep-num-sms": "is not offered: HybridEP was never run; leave it at Megatron's value",
    "moe-flex-dispatcher-num-sms": "is not offered: neither backend was ever run; leave it at Megatron's value",
    "moe-paged-stash": _STATIC,
    # The schedule.
    "overlap-moe-expert-parallel-comm": _COMBINED,
    "delay-wgrad-compute": "is a part of --overlap-moe-expert-parallel-comm, which is not offered; leave it out",
    "cuda-graph-impl": _GRAPH,
    "enable-cuda-graph": _GRAPH,
    "external-cuda-graph": _GRAPH,
    "cuda-graph-scope": "is for --cuda-graph-impl, which is not offered; leave it out",
    "cuda-graph-modules": "is for --cuda-graph-impl, which is not offered; leave it out",
    # Memory.
    "fine-grained-activation-offloading": _OFFLOAD,
    "offload-modules": _OFFLOAD,
    "min-offloaded-tensor-size": _OFFLOAD,
    "activation-offload-fraction": _OFFLOAD,
    "cpu-offloading": _OFFLOAD,
    "cpu-offloading-num-layers": _OFFLOAD,
    "use-torch-optimizer-for-cpu-offload": "is always so with --optimizer-cpu-offload; leave it out",
    "pin-cpu-grads": "is always so with --optimizer-cpu-offload; leave it out",
    "pin-cpu-params": "is always so with --optimizer-cpu-offload; leave it out",
    "reuse-grad-buf-for-mxfp8-param-ag": (
        "is for weights in MXFP8, which are not offered: --fp8-param-gather takes the recipes tensorwise and blockwise"
    ),
    "store-param-remainders": "is always so with --use-precision-aware-optimizer; leave it out",
    "recompute-activations": "is --recompute-granularity selective",
    "use-megatron-fsdp": _FSDP,
    "use-custom-fsdp": _FSDP,
    "use-torch-fsdp2": _FSDP,
    "data-parallel-sharding-strategy": _FSDP,
    # Formats.
    "accumulate-allreduce-grads-in-fp32": "is always so, unless --main-grads-dtype bf16 says otherwise; leave it out",
    "grad-reduce-in-bf16": "is --use-precision-aware-optimizer --main-grads-dtype bf16",
    "fp8": "is named --fp8-format",
    "fp8-amax-history-len": "is 1024 with the recipe delayed; leave it out",
    "fp8-amax-compute-algo": "is max with the recipe delayed; leave it out",
    "fp8-margin": "is Megatron's 0; leave it out",
    "fp4-format": "is not offered: neither emulated nor run; use --fp8-format",
    "fp4-recipe": "is not offered: neither emulated nor run; use --fp8-recipe",
    "fp4-param-gather": "is not offered: neither emulated nor run; use --fp8-param-gather",
    "loss-scale": "is for float16, in which nothing trains here; leave it out",
    "attention-backend": _KERNELS,
    "use-flash-attn": _KERNELS,
    "cross-entropy-loss-fusion": _KERNELS,
    "tp-comm-overlap": "is not offered: neither emulated nor run; leave it out",
    "calculate-per-token-loss": _ALWAYS,
    # The model.
    "num-layers": _CHECKPOINT,
    "hidden-size": _CHECKPOINT,
    "ffn-hidden-size": _CHECKPOINT,
    "num-attention-heads": _CHECKPOINT,
    "group-query-attention": _CHECKPOINT,
    "num-query-groups": _CHECKPOINT,
    "kv-channels": _CHECKPOINT,
    "max-position-embeddings": _CHECKPOINT,
    "position-embedding-type": _CHECKPOINT,
    "rotary-base": _CHECKPOINT,
    "normalization": _CHECKPOINT,
    "norm-epsilon": _CHECKPOINT,
    "swiglu": _CHECKPOINT,
    "disable-bias-linear": _CHECKPOINT,
    "add-qkv-bias": _CHECKPOINT,
    "qk-layernorm": _CHECKPOINT,
    "untie-embeddings-and-output-weights": _CHECKPOINT,
    "vocab-size": _CHECKPOINT,
    "tokenizer-type": _CHECKPOINT,
    "tokenizer-model": _CHECKPOINT,
    "mtp-num-layers": "is not offered: the families that are imported have no such layers; leave it out",
    "init-method-std": "is not needed: every weight comes from --load; leave it out",
    "attention-dropout": "is 0, as the dense model's; leave it out",
    "hidden-dropout": "is 0, as the dense model's; leave it out",
    # The run.
    "optimizer": "is AdamW, the paper's; leave it out",
    "train-samples": "is not offered; give --train-iters",
    "lr-decay-samples": "is not offered; give --lr-decay-iters",
    "lr-warmup-samples": "is not offered; give --lr-warmup-iters",
    "lr-warmup-fraction": "is not offered; give --lr-warmup-iters",
    "rampup-batch-size": "is not offered: the global batch is the same in every step; leave it out",
    "finetune": _RESUME,
    "no-load-optim": _RESUME,
    "no-load-rng": _RESUME,
    "ckpt-format": "is torch_dist always; leave it out",
    "use-dist-ckpt": _ALWAYS,
    "distributed-backend": "follows from --platform; leave it out",
    "use-mcore-models": _ALWAYS,
}

REFUSED: dict[str, str] = {f"--{name}": f"--{name} {reason}" for name, reason in _REASONS.items()}
"""Error line by flag. No flag of a run is one of them (tests/training/configuration/test_megatron_flags.py)."""


def refuse_megatron_flags(words: Sequence[str], own: Collection[str] = ()) -> None:
    """Check a command line for flags of Megatron's that a run does not take.

    Args:
        words: of a command line, or as `command_line.flag_words` returns those of a file.
        own: flags that the command takes all the same.

    Raises:
        UserError: naming the first such flag and the reason.
    """
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        for flag in (name, name.replace("--no-", "--", 1)):
            if flag in REFUSED and flag not in own:
                raise UserError(REFUSED[flag])
