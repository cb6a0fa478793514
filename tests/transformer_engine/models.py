"""What the ranks do: build, load, save and compare models of either specification."""

import contextlib
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
from megatron.core.transformer import TransformerConfig

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.checkpoint.loading import model as loading
from megatron_moe_lpr.checkpoint.loading.model import LoadedModel, load_model, model_shape
from megatron_moe_lpr.checkpoint.loading.model_state import CONTENT_METADATA, EXTRA_STATE, sharded_model_state
from megatron_moe_lpr.checkpoint.untrusted.extra_state import check_extra_states
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import write_manifest
from megatron_moe_lpr.model.build import build_model, unwrap
from megatron_moe_lpr.model.configuration.config import ComputeOptions, transformer_config
from megatron_moe_lpr.model.configuration.fp8 import FP8Options
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.training.configuration.stages import STAGES, freeze
from tests.transformer_engine.ranks import platform_of_this_rank

NEVER_A_WEIGHT = 12345.0


def load(path: Path, expert_parallel: int = 1, options: ComputeOptions | None = None) -> LoadedModel:
    """Load as the package does, every parameter spoilt beforehand so that none can stay at its initial value."""
    platform, layout = platform_of_this_rank(), ParallelLayout(expert_model_parallel_size=expert_parallel)
    initialize_parallel(platform, layout)
    with _spoilt_parameters():
        return load_model(path, layout, platform, options, use_cpu_initialization=True)


@contextlib.contextmanager
def _spoilt_parameters():
    def build_and_spoil(*args: Any, **kwargs: Any) -> list[torch.nn.Module]:
        chunks = build_model(*args, **kwargs)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(NEVER_A_WEIGHT)
        return chunks

    loading.build_model = build_and_spoil
    try:
        yield
    finally:
        loading.build_model = build_model


def parameters(path: Path, expert_parallel: int = 1) -> dict[str, torch.Tensor]:
    """This rank's parameters under their checkpoint keys (local shards), after loading."""
    return local_shards(load(path, expert_parallel))


def local_shards(model: LoadedModel) -> dict[str, torch.Tensor]:
    """This rank's tensors by checkpoint key and place in the whole tensor; extra states left out."""
    state = sharded_model_state(model.chunks)
    apply_factories(state)
    return {
        f"{part.key} {part.global_offset} of {part.global_shape}": part.data.detach().clone()
        for part in nested_values(state)
        if isinstance(part, ShardedTensor) and EXTRA_STATE not in part.key
    }


def save_again(path: Path, target: Path, expert_parallel: int = 1) -> None:
    """Load a checkpoint and write it by Megatron's own dist_checkpointing, with the files that lie beside it."""
    model = load(path, expert_parallel)
    partial = target / "release"
    if torch.distributed.get_rank() == 0:
        partial.mkdir(parents=True)
        shutil.copytree(model.directory.side_directory, partial / "moe_lpr")
        (target / "latest_checkpointed_iteration.txt").write_text("release")
    torch.distributed.barrier()
    state = sharded_model_state(model.chunks)
    dist_checkpointing.save(state, str(partial), content_metadata=dict(CONTENT_METADATA))
    if torch.distributed.get_rank() == 0:
        write_manifest(partial, {})


def differing_keys(path: Path) -> list[str]:
    """Keys that the model or the checkpoint has alone, by Megatron's loading and by torch's."""
    model = load(path)
    loaded, *differing = dist_checkpointing.load(
        sharded_model_state(model.chunks), str(model.directory.path), strict=StrictHandling.RETURN_ALL
    )
    result = unwrap(model.chunks[0]).load_state_dict(loaded["model"], strict=False)
    return sorted({*differing[0], *differing[1], *result.missing_keys, *result.unexpected_keys})


def trainable_and_frozen(path: Path, stage: str) -> tuple[list[str], list[str]]:
    """Checkpoint keys of what trains and of what is frozen in a stage."""
    model = load(path)
    freeze(model.chunks, STAGES[stage])
    shards = unwrap(model.chunks[0]).sharded_state_dict(metadata=dict(CONTENT_METADATA))
    trainable, frozen = [], []
    for name, parameter in unwrap(model.chunks[0]).named_parameters():
        part = shards[name]
        # A gated fc1 lies in two halves under one key.
        (trainable if parameter.requires_grad else frozen).append(part.key)
    return sorted(trainable), sorted(frozen)


def construct(path: Path, fp8: FP8Options) -> dict[str, str]:
    """Build with FP8 set, enter the recipe's context as the transformer block does; classes of the layer's parts."""
    platform, layout = platform_of_this_rank(), ParallelLayout()
    initialize_parallel(platform, layout)
    shape = model_shape(resolve_checkpoint(path))
    options = ComputeOptions(dtype=torch.bfloat16, fp8=fp8)
    config = transformer_config(shape, layout, platform, options, use_cpu_initialization=True)
    model = unwrap(build_model(shape, config, platform)[0])
    found = {name: type(module).__name__ for name, module in model.decoder.layers[0].named_modules()}
    if fp8.enabled:
        found["recipe"] = type(get_fp8_recipe(config)).__name__
        with get_fp8_context(config, 1):
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            found["entered"] = str(FP8GlobalStateManager.is_fp8_enabled())
    return found


def first_fp8_parameter(path: Path, fp8: FP8Options) -> str:
    """Build with FP8 parameters until the first weight is quantised, which needs a kernel: the error that ends it."""
    try:
        construct(path, fp8)
    except NotImplementedError as error:
        return str(error)
    return "no weight was quantised"


def look_at_recipe(recipe: str) -> tuple[bytes, str]:
    """The recipe that Megatron makes, pickled as Transformer Engine's `get_extra_state` does; why it is refused."""
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=1, fp8="hybrid", fp8_recipe=recipe, bf16=True
    )
    saved = pickle.dumps({"recipe": get_fp8_recipe(config), "scale_fwd": torch.ones(3)})
    return saved, _refusal(saved)


def recipe_again(recipe: str) -> tuple[dict, dict]:
    """Attributes of a recipe as it was saved, and of what Transformer Engine gets of it."""
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=1, fp8="e4m3", fp8_recipe=recipe, bf16=True, fp8_margin=2
    )
    saved = get_fp8_recipe(config)
    state = {"_extra_state": torch.frombuffer(bytearray(pickle.dumps({"recipe": saved})), dtype=torch.uint8)}
    check_extra_states(state, Path("checkpoint"))
    found = pickle.loads(state["_extra_state"].numpy().tobytes())["recipe"]  # written by check_extra_states
    assert type(found) is type(saved)
    return {name: repr(value) for name, value in vars(saved).items()}, {
        name: repr(value) for name, value in vars(found).items()
    }


def look_at_names_beside_recipes() -> list[str]:
    """Why pickles are refused that name something else from the modules of the recipes."""
    from megatron.core.extensions.transformer_engine import TECudaRNGStatesTracker
    from transformer_engine.common.recipe import DelayedScaling

    return [_refusal(pickle.dumps(value)) for value in (TECudaRNGStatesTracker, DelayedScaling.delayed)]


def _refusal(saved: bytes) -> str:
    state = {"layer._extra_state": torch.frombuffer(bytearray(saved), dtype=torch.uint8)}
    try:
        check_extra_states(state, Path("checkpoint"))
    except UserError as error:
        return str(error)
    return ""
