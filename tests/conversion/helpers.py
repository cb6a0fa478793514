"""What several test files need: commands in this process, and whole directories of tensors."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.checkpoint.format.reader import CheckpointReader
from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.commands import convert
from megatron_moe_lpr.files.checksum_file import write_checksums

# Flags that say of a stock MoE without this project's files that it was upcycled.
UPCYCLED_ELSEWHERE = ("--original-languages", "en", "--expanded-languages", "el")
TOOL = Path(__file__).parents[2] / "tools" / "convert_hf.py"


def run(*arguments: object) -> None:
    """Run tools/convert_hf.py with these arguments in this process."""
    convert.main([str(argument) for argument in arguments])


def hf_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory, read by the safetensors library."""
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def checkpoint_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Megatron checkpoint."""
    reader = CheckpointReader(resolve_checkpoint(directory).path)
    return {key: reader.read(key) for key in reader.tensors}


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def rewrite_checkpoint(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint in place, as training would."""
    tensors = checkpoint_tensors(directory)
    change(tensors)
    path = resolve_checkpoint(directory).path
    for file in path.glob("*.distcp"):
        file.unlink()
    with CheckpointWriter(path, {}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor.contiguous())
    write_checksums(path, writer.checksums)


def perturb(tensors: dict[str, torch.Tensor]) -> None:
    """Make new experts and routers differ, so that routing and the order of experts show."""
    generator = torch.Generator().manual_seed(7)
    for key, tensor in tensors.items():
        if ".mlp.experts." in key or ".router." in key:
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[key] = (tensor.float() + 0.2 * noise).to(tensor.dtype)


def change_config(directory: Path, **fields: object) -> None:
    """Change fields of a config.json in place; None removes one."""
    path = directory / "config.json"
    changed = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in changed.items() if fields.get(name, 0) is not None}))


def change_hf(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a single-file Hugging Face directory in place."""
    tensors = hf_tensors(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
