"""The two models that `verify` compares: transformers' own class, and the Megatron model in this one process."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.format.chain import resolve_and_hold
from megatron_moe_lpr.checkpoint.format.directory import CONFIG_FILE, CheckpointDirectory
from megatron_moe_lpr.checkpoint.loading.model import load_model, model_shape
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint
from megatron_moe_lpr.conversion.hugging_face.hf_directory import open_hf_directory
from megatron_moe_lpr.conversion.hugging_face.installed_transformers import check_model_type
from megatron_moe_lpr.conversion.hugging_face.quiet import quiet_transformers
from megatron_moe_lpr.conversion.hugging_face.tokenizer_samples import TEXTS
from megatron_moe_lpr.conversion.verification.verify import Comparison, Forward, Outputs, compare, random_tokens
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.dtype import report_dtype
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import Platform


def verify_checkpoint(
    load: Path,
    hf: Path,
    dtype: torch.dtype,
    platform: Platform,
    sequence_length: int,
    batch: int = 2,
    verified: bool = True,
    base: Path | None = None,
) -> Comparison:
    """Compare a checkpoint with a Hugging Face directory on random tokens.

    A dense model is compared with a checkpoint of an extended vocabulary in the logits of its own tokens, on text that
    its own tokenizer splits, where it has one.

    Raises:
        UserError: one of them cannot be loaded, or `sequence_length` is more than its positions.
    """
    with resolve_and_hold(load, base) as iteration:
        checkpoint = open_checkpoint(iteration, verified, base)
        return _compare(checkpoint, hf, dtype, platform, (batch, sequence_length), verified)


def _compare(
    checkpoint: CheckpointDirectory,
    hf: Path,
    dtype: torch.dtype,
    platform: Platform,
    batch_and_length: tuple[int, int],
    verified: bool,
) -> Comparison:
    vocab_size, model = _compared_tokens(checkpoint, hf), open_hf_directory(hf)
    reference = model.architecture
    longest = min(reference.max_position_embeddings, checkpoint.architecture().max_position_embeddings)
    if batch_and_length[1] > longest:
        raise UserError(f"--seq-length {batch_and_length[1]}: the model has only {longest} positions")
    num_layers, inserted = checkpoint.architecture().num_layers, checkpoint.card().inserted_blocks
    if reference.num_layers not in (num_layers, num_layers - len(inserted)):
        raise UserError(f"{hf}: {reference.num_layers} layers, the checkpoint has {num_layers}")
    left_out = inserted if reference.num_layers < num_layers else []
    card = checkpoint.card()
    report_dtype(dtype, card.compute_dtype, card.dtype, platform)
    tokens = random_tokens(vocab_size, *batch_and_length)
    if vocab_size < model_shape(checkpoint).total_vocab_size:
        tokens = _sample_tokens(hf, vocab_size, *batch_and_length)
    ours = megatron_forward(checkpoint, dtype, platform, verified, vocab_size)
    return compare(transformers_forward(hf, dtype, platform.device), _without(ours, left_out), tokens)


def _compared_tokens(checkpoint: CheckpointDirectory, hf: Path) -> int:
    """Number of token ids that both models have: all of the checkpoint's, or the dense model's where it has more."""
    shape, model = model_shape(checkpoint), open_hf_directory(hf)
    found = model.architecture.vocab_size + sum(model.new_tokens)
    if found not in (shape.total_vocab_size, shape.architecture.vocab_size):
        raise UserError(f"{hf}: vocabulary of {found:,} tokens, the checkpoint has {shape.total_vocab_size:,}")
    return found


def _sample_tokens(hf: Path, vocab_size: int, batch: int, sequence: int) -> torch.Tensor:
    """Text in several scripts, split by the tokenizer of a Hugging Face directory, int64 [batch, sequence]; random
    tokens where it has no tokenizer that can be read."""
    try:
        encoded = load_tokenizer(hf).encode_batch(TEXTS)
    except UserError:
        return random_tokens(vocab_size, batch, sequence)
    ids = [number for text in encoded for number in text if number < vocab_size]
    if not ids:
        return random_tokens(vocab_size, batch, sequence)
    repeated = torch.tensor(ids).repeat(-(-batch * sequence // len(ids)))
    return repeated[: batch * sequence].view(batch, sequence)


def _without(forward: Forward, layers: list[int]) -> Forward:
    """Leave out the outputs of inserted blocks, which the dense model that is compared does not have."""

    def fewer(tokens: torch.Tensor) -> Outputs:
        outputs = forward(tokens)
        kept = [output for layer, output in enumerate(outputs.layers) if layer not in layers]
        return dataclasses.replace(outputs, layers=kept)

    return fewer


def transformers_forward(directory: Path, dtype: torch.dtype, device: torch.device) -> Forward:
    """The model of a local Hugging Face directory, dense or MoE, by transformers' stock class.

    Raises:
        UserError: transformers found weights missing or left over, or the installed version does not have the model.
    """
    from transformers import AutoModelForCausalLM

    check_model_type(read_json(directory / CONFIG_FILE), f"{directory / CONFIG_FILE}")

    with quiet_transformers():
        # Annotated without `output_loading_info`, with which it returns a pair.
        loaded: tuple[torch.nn.Module, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            directory,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation="eager",
        )
    model, information = loaded
    problems = {kind: list(names)[:3] for kind, names in information.items() if names}
    if problems:
        raise UserError(f"{directory}: transformers does not load it cleanly: {problems}")
    model.to(device).eval()

    def forward(tokens: torch.Tensor) -> Outputs:
        with _recorded(model.get_submodule("model.layers").children()) as layers:
            logits = model(tokens.to(device)).logits
        return Outputs(logits, layers)

    return forward


def megatron_forward(
    checkpoint: CheckpointDirectory,
    dtype: torch.dtype,
    platform: Platform,
    verified: bool = True,
    vocab_size: int | None = None,
) -> Forward:
    """The model of a checkpoint, whole in this process.

    Args:
        vocab_size: token ids whose logits are returned; None: all.

    Raises:
        UserError: the checkpoint does not fit the model that its card describes.
    """
    initialize_parallel(platform, ParallelLayout())
    options = ComputeOptions().with_dtype(dtype)
    loaded = load_model(checkpoint, ParallelLayout(), platform, options, verified=verified)
    total = loaded.shape.total_vocab_size
    wanted = total if vocab_size is None else vocab_size

    def forward(tokens: torch.Tensor) -> Outputs:
        with _recorded(unwrap(loaded.chunks[0]).decoder.layers) as layers:
            logits = compute_logits(loaded.chunks, loaded.config, tokens.to(platform.device), total)
        mass = logits.softmax(-1)[..., wanted:].sum(-1).mean().item() if wanted < total else None
        return Outputs(logits[..., :wanted], [layer.transpose(0, 1) for layer in layers], mass)

    return forward


@contextlib.contextmanager
def _recorded(layers: Iterable[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collects what each layer puts out."""
    outputs: list[torch.Tensor] = []

    def record(module: torch.nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
