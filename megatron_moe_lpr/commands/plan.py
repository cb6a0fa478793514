"""Plan a run: parameters, operations, the layouts that fit into GPU memory, best first, and their communication.

Layout flags that you give are kept; the others are searched.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.conversion.hugging_face.hub import model_config_file
from megatron_moe_lpr.engine.state_options import OptimizerStateOptions
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_ranges import PositiveFloat, PositiveInt, Range
from megatron_moe_lpr.platform import TransformerImpl

if TYPE_CHECKING:
    from megatron_moe_lpr.conversion.import_options import ImportOptions
    from megatron_moe_lpr.model.configuration.architecture import Architecture
    from megatron_moe_lpr.model.configuration.config import ModelShape
    from megatron_moe_lpr.planning.search import Candidate
    from megatron_moe_lpr.planning.sizes import RunSizes


@dataclasses.dataclass(frozen=True)
class Flags:
    """Plan a run."""

    gpus: PositiveInt
    """GPUs of the run."""
    gpu_memory: PositiveFloat = 80.0
    """GiB of one GPU."""
    gpus_per_node: PositiveInt = 8
    """GPUs of one node. TP stays inside a node."""
    hf: str | None = None
    """A dense model, upcycled as the flags from --num-experts to --experts-per-layer say, or a mixture with
    --add-experts: a Hugging Face directory, its config.json, a GGUF file, or a name on the hub such as
    Qwen/Qwen1.5-1.8B, of which only the config.json is downloaded."""
    revision: str | None = None
    """For a name on the hub: branch, tag or commit. Default: its main branch."""
    num_experts: PositiveInt | None = None
    """Experts per layer, the original one included. Default: 6 (paper); a mixture and --load have their own."""
    top_k: PositiveInt | None = None
    """Experts per token. Default: the paper's 2; a mixture and --load have their own."""
    moe_layer_freq: str | None = None
    """Which layers have experts: N for every N-th one from layer 0 on, or a pattern such as "[0]+[1]*31". Default: 1,
    every layer; a mixture and --load have their own."""
    experts_per_layer: str | None = None
    """Experts of each layer, instead of --num-experts and --moe-layer-freq: 5,4,3,... or the JSON file of
    `moe-lpr allocate`. The plan then also shows what that saves against --num-experts in every layer."""
    add_experts: str | None = None
    """With --hf of a mixture such as Qwen3-MoE: new experts of every layer, or of each, as in `import`."""
    new_tokens: PositiveInt | None = None
    """With --hf: tokens that an extended tokenizer adds, whose rows train (`import --tokenizer`)."""
    load: Path | None = None
    """A converted checkpoint, instead of --hf."""
    stage: Literal["1", "2", "sft", "full", "blocks"] = "1"
    """1 and sft train new experts and routers, 2 routers, full everything, blocks the inserted blocks of --load; each
    trains rows of new tokens too."""
    seq_length: PositiveInt = 1024
    """Tokens of a sequence."""
    micro_batch_size: PositiveInt = 1
    """Sequences a data-parallel rank computes at once."""
    global_batch_size: PositiveInt = 512
    """Sequences of an optimizer step."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    """fp8: matrix products in FP8, the rest in bf16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "delayed"
    """With --precision fp8: how tensors are scaled."""
    fp8_param_gather: bool = False
    """With --precision fp8: keep the new experts' weights in FP8."""
    transformer_impl: TransformerImpl = "transformer_engine"
    """Whose layers compute: Transformer Engine's, or PyTorch's alone (local), as on GPUs without it."""
    use_distributed_optimizer: bool = True
    """Split the optimizer's state over the data-parallel ranks."""
    states: tyro.conf.OmitArgPrefixes[OptimizerStateOptions] = dataclasses.field(default_factory=OptimizerStateOptions)
    tensor_model_parallel_size: PositiveInt | None = None
    """TP. Default: searched."""
    pipeline_model_parallel_size: PositiveInt | None = None
    """PP. Default: searched."""
    expert_model_parallel_size: PositiveInt | None = None
    """EP. Default: searched."""
    context_parallel_size: PositiveInt = 1
    """CP. Not searched: for sequences too long for one GPU."""
    recompute: Literal["none", "core_attn", "layernorm", "moe_act", "mlp", "moe", "full"] | None = None
    """Activation recomputation: none, one of training's --recompute-modules, or full layers. Default: searched."""
    show: PositiveInt = 8
    """Layouts to show."""
    routing: Path | None = None
    """JSON file of evaluate --output, whose routing the communication is computed with. Default: balanced."""
    original_share: Annotated[float, Range(0, 1)] | None = None
    """With --routing: share of original-language tokens. Default: as in the checkpoint's last training data."""
    peak_tflops: PositiveFloat = 989.0
    """TFLOP/s of a GPU, by default an H100's in bf16 (1979 in FP8). This and the next three estimate step time."""
    utilization: Annotated[float, Range(0, 1, above=True)] = 0.4
    """Share of --peak-tflops that a step reaches: an assumption."""
    node_bandwidth: PositiveFloat = 450.0
    """GB/s that a GPU sends to others of its node."""
    network_bandwidth: PositiveFloat = 50.0
    """GB/s that a GPU sends to other nodes."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    shape, sizes, candidates = find(flags)
    from megatron_moe_lpr.planning.checkpoint_size import describe_needs
    from megatron_moe_lpr.planning.interconnect import Hardware
    from megatron_moe_lpr.planning.planned_run import PlannedRun
    from megatron_moe_lpr.planning.report import print_communication, print_launches, print_plan
    from megatron_moe_lpr.planning.routing import Routing, read_routing

    routing = read_routing(flags.routing, flags.original_share) if flags.routing else Routing()
    machine = _machine(flags)
    print_plan(shape, sizes, machine, candidates[: flags.show])
    if flags.gpus > 1:
        speeds = (flags.peak_tflops, flags.utilization, flags.node_bandwidth, flags.network_bandwidth)
        print_communication(shape, sizes, candidates[: flags.show], routing, Hardware(flags.gpus_per_node, *speeds))
    best = PlannedRun(shape, candidates[0].layout, sizes, candidates[0].recompute)
    print_launches(best, machine)
    print(describe_needs(best, flags.gpus_per_node))
    if flags.states.optimizer_cpu_offload:
        from megatron_moe_lpr.planning.host_state import describe_host_state

        print(describe_host_state(best, flags.gpus_per_node))
    if flags.experts_per_layer is not None:
        from megatron_moe_lpr.conversion.import_options import PAPER_NUM_EXPERTS
        from megatron_moe_lpr.planning.allocation_savings import saving_against_uniform

        print(saving_against_uniform(shape, sizes, flags.num_experts or PAPER_NUM_EXPERTS))


def find(flags: Flags) -> tuple["ModelShape", "RunSizes", list["Candidate"]]:
    """Return the model, the run, and the layouts that fit, best first. Raises UserError."""
    _check(flags)
    if flags.hf is not None:
        # A name on the hub becomes the file in the cache, which is then read twice.
        flags = dataclasses.replace(flags, hf=str(model_config_file(flags.hf, flags.revision)), revision=None)
    # Megatron takes seconds to import, which the checks above do not need.
    from megatron_moe_lpr.planning.search import Choice, find_layouts

    shape, sizes = read_shape(flags), read_sizes(flags)
    _check_model(flags, shape, sizes)
    choice = Choice(
        _given(flags.tensor_model_parallel_size),
        _given(flags.pipeline_model_parallel_size),
        _given(flags.expert_model_parallel_size),
        _given(flags.recompute),
        flags.context_parallel_size,
    )
    return shape, sizes, find_layouts(shape, sizes, _machine(flags), choice)


def _machine(flags: Flags):
    """Return the GPUs that the run is planned for."""
    from megatron_moe_lpr.planning.search import Machine

    speed = flags.peak_tflops * 1e12 * flags.utilization
    return Machine(flags.gpus, flags.gpus_per_node, flags.gpu_memory, speed)


def _check(flags: Flags) -> None:
    if (flags.hf is None) == (flags.load is None):
        raise UserError("give either --hf, a dense Hugging Face model, or --load, a converted checkpoint")
    if flags.revision is not None and flags.hf is None:
        raise UserError("--revision: is for a name on the hub, given by --hf; leave the flag out")
    if flags.precision == "fp8" and flags.transformer_impl == "local":
        raise UserError("--precision fp8 needs the layers of Transformer Engine: leave --transformer-impl local out")
    if flags.context_parallel_size > 1 and flags.precision == "fp32" and flags.transformer_impl != "local":
        raise UserError(
            f"--context-parallel-size {flags.context_parallel_size}: Transformer Engine's attention in fp32 is not "
            "split over ranks; plan for --precision bf16 or --transformer-impl local"
        )
    if flags.fp8_param_gather and flags.precision != "fp8":
        raise UserError("--fp8-param-gather needs --precision fp8")
    if flags.fp8_param_gather:
        import torch

        from megatron_moe_lpr.model.configuration.fp8 import FP8Options, check_fp8_flags

        check_fp8_flags(FP8Options("hybrid", flags.fp8_recipe, fp8_param_gather=True), torch.bfloat16)
    if flags.states.use_precision_aware_optimizer and (
        flags.precision == "fp32" or not flags.use_distributed_optimizer
    ):
        raise UserError("--use-precision-aware-optimizer needs bf16 or fp8, and --use-distributed-optimizer")
    if flags.original_share is not None and flags.routing is None:
        raise UserError("--original-share needs --routing")


def _check_model(flags: Flags, shape: "ModelShape", sizes: "RunSizes") -> None:
    """Check stage and flags against the model as training does. Raises UserError."""
    from megatron_moe_lpr.engine.options import OptimizerOptions
    from megatron_moe_lpr.training.configuration.model_checks import check_fp8_param_gather, check_sequence_length
    from megatron_moe_lpr.training.configuration.stages import STAGES, check_stage_model

    stage = STAGES[flags.stage]
    flag = "--load" if flags.hf is None else "--hf"
    check_stage_model(stage, shape.max_experts > 1, bool(shape.inserted_blocks), flag)
    check_sequence_length(flags.seq_length, shape.architecture)
    optimizer = OptimizerOptions(use_distributed_optimizer=flags.use_distributed_optimizer, states=flags.states)
    check_fp8_param_gather(sizes.fp8, stage, bool(shape.expansions), optimizer)


def read_shape(flags: Flags):
    """Return the shape of the checkpoint's model, or of the model that upcycling --hf would make. Raises UserError."""
    from megatron_moe_lpr.checkpoint.format.card import read_json
    from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
    from megatron_moe_lpr.checkpoint.loading.model import model_shape
    from megatron_moe_lpr.conversion.import_options import given_experts, upcycled_experts
    from megatron_moe_lpr.model.configuration.architecture import read_architecture
    from megatron_moe_lpr.model.configuration.config import ModelShape

    if flags.hf is None and flags.load is not None:
        if flags.experts_per_layer is not None:
            raise UserError("--experts-per-layer: the checkpoint given by --load knows its experts; leave the flag out")
        if flags.new_tokens is not None:
            raise UserError("--new-tokens: the checkpoint given by --load knows its new tokens; leave the flag out")
        if flags.add_experts is not None:
            raise UserError("--add-experts: the checkpoint given by --load has its new experts; leave the flag out")
        shape = model_shape(resolve_checkpoint(flags.load))
        given_experts(_expert_flags(flags), list(shape.experts_per_layer), shape.top_k, f"--load {flags.load}")
        return shape
    path = Path(flags.hf or "")
    architecture = read_architecture(read_json(path), str(path))
    if architecture.mixture or flags.add_experts is not None:
        return _mixture_shape(flags, architecture)
    options = _expert_flags(flags)
    if flags.experts_per_layer is not None:
        options = dataclasses.replace(options, num_experts=None)  # What --experts-per-layer is compared with.
    experts, top_k = upcycled_experts(options, architecture.num_layers)
    return ModelShape(architecture, tuple(experts), top_k, new_tokens=_given(flags.new_tokens))


def _expert_flags(flags: Flags) -> "ImportOptions":
    """Return the flags that say which experts the model has as those of an import."""
    from megatron_moe_lpr.conversion.import_options import ImportOptions

    path = Path(flags.hf or "")
    return ImportOptions(path, flags.num_experts, flags.top_k, flags.moe_layer_freq, flags.experts_per_layer)


def _mixture_shape(flags: Flags, architecture: "Architecture") -> "ModelShape":
    """Return the shape of a mixture base with the new experts of --add-experts. Raises UserError."""
    from megatron_moe_lpr.conversion.added_experts import added_counts
    from megatron_moe_lpr.conversion.import_options import ADD_FLAG, given_experts
    from megatron_moe_lpr.model.configuration.config import ModelShape

    mixture = architecture.mixture
    if mixture is None:
        raise UserError(f"{ADD_FLAG}: is for a base model that is a mixture, and {flags.hf} is dense")
    if flags.add_experts is None:
        raise UserError(f"{flags.hf}: is a mixture; say with {ADD_FLAG} how many experts it gets")
    given_experts(_expert_flags(flags), list(mixture.experts), mixture.top_k, str(flags.hf))
    counts = added_counts(flags.add_experts, mixture.experts)
    experts = tuple(base + count for base, count in zip(mixture.experts, counts, strict=True))
    return ModelShape(architecture, experts, mixture.top_k, (tuple(counts),), new_tokens=_given(flags.new_tokens))


def read_sizes(flags: Flags):
    """Return the sizes and formats of a run that decide its memory."""
    from megatron_moe_lpr.planning.sizes import RunSizes
    from megatron_moe_lpr.training.configuration.stages import STAGES

    return RunSizes(
        trains=STAGES[flags.stage].trains,
        gpus=flags.gpus,
        seq_length=flags.seq_length,
        micro_batch_size=flags.micro_batch_size,
        global_batch_size=flags.global_batch_size,
        precision=flags.precision,
        distributed_optimizer=flags.use_distributed_optimizer,
        fp8_recipe=flags.fp8_recipe,
        fp8_param_gather=flags.fp8_param_gather,
        states=flags.states,
        stored_dtype=_stored_dtype(flags),
        transformer_engine=flags.transformer_impl == "transformer_engine",
    )


def _stored_dtype(flags: Flags):
    """Return the dtype of the dense model's weights, read from the checkpoint's card or from config.json."""
    from megatron_moe_lpr.checkpoint.format.card import MODEL_DTYPES, read_json
    from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint

    if flags.load is not None:
        return resolve_checkpoint(flags.load).card().dtype
    if flags.hf is None:
        return None
    config = read_json(Path(flags.hf))
    named = (config.get(name) for name in ("dtype", "torch_dtype"))
    return next((dtype for dtype in named if dtype in MODEL_DTYPES), None)


def _given(value):
    return () if value is None else (value,)
