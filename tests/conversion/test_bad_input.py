"""Everything that can be wrong with the input: one clear line, a non-zero exit code, nothing left behind."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_moe_lpr.checkpoint.format import writer
from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.conversion.hugging_face import safetensors_writer
from megatron_moe_lpr.files.checksums import write_manifest
from tests.conversion.helpers import TOOL, change_hf, rewrite_checkpoint, run
from tests.conversion.tiny_models import save_model

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def dense(tmp_path: Path, dense_directory: Callable[[str], Path]) -> Path:
    """A Qwen2 directory that the test may spoil."""
    return Path(shutil.copytree(dense_directory("qwen2"), tmp_path / "dense"))


@pytest.fixture
def refuse(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail; gives its one error line."""

    def call(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run(*arguments)
        assert exit_.value.code in (1, 2)  # 2: of a flag that is refused before anything is imported
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return lines[0]

    return call


def change_config(directory: Path, **fields: object) -> None:
    config = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))


def test_missing_shard(tmp_path: Path, refuse: Callable[..., str]) -> None:
    dense = save_model("qwen2", tmp_path / "sharded", max_shard_size="20KB")
    shard = sorted(dense.glob("*.safetensors"))[1]
    shard.unlink()
    line = refuse("import", "--hf", dense, "--save", tmp_path / "out")
    assert shard.name in line and "no such file" in line


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
def test_truncated_safetensors(keep: int, dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    path = dense / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    line = refuse("import", "--hf", dense, "--save", tmp_path / "out")
    assert "model.safetensors" in line and "cut short" in line


def test_not_safetensors(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (dense / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"notajson" + bytes(100))
    assert "not a safetensors file" in refuse("import", "--hf", dense, "--save", tmp_path / "out")


def remove_tensor(tensors: Tensors) -> None:
    del tensors["model.layers.1.self_attn.k_proj.bias"]


def add_tensor(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.sinks"] = torch.ones(4)


def reshape_tensor(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(31)


def mix_dtypes(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove_tensor, "lack model.layers.1.self_attn.k_proj.bias"),
        (add_tensor, "no place for model.layers.1.self_attn.sinks"),
        (reshape_tensor, "model.norm.weight has shape [31], config.json wants [32]"),
        (mix_dtypes, "mix the dtypes bfloat16, float32"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[Tensors], None], words: str, dense: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    change_hf(dense, change)
    assert words in refuse("import", "--hf", dense, "--save", tmp_path / "out")


def test_tied_output_layer_that_differs(tmp_path: Path, refuse: Callable[..., str]) -> None:
    dense = save_model("qwen2-tied", tmp_path / "tied")
    change_hf(dense, lambda tensors: tensors.update({"lm_head.weight": torch.ones(99, 32)}))
    assert "lm_head.weight" in refuse("import", "--hf", dense, "--save", tmp_path / "out")


def test_unknown_architecture_lists_the_known(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    change_config(dense, model_type="gpt2")
    line = refuse("import", "--hf", dense, "--save", tmp_path / "out")
    assert "'gpt2' is not supported" in line and "LlamaForCausalLM" in line and "MistralForCausalLM" in line


def test_damaged_config(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (dense / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refuse("import", "--hf", dense, "--save", tmp_path / "out")


def test_pickles_only(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    line = refuse("import", "--hf", dense, "--save", tmp_path / "out")
    assert ".bin" in line and "save_pretrained" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num-experts", 6, "--expert-model-parallel-size", 4), "does not divide 5 new experts"),
        (("--num-experts", 3, "--top-k", 4), "--top-k 4"),
        (("--num-experts", 3, "--top-k", 1), "would not compute what the dense model does"),
        (("--num-experts", 3, "--moe-layer-freq", 9), "--moe-layer-freq 9: must lie between 1 and"),
        (("--num-experts", 3, "--moe-layer-freq", "[1]*9"), "names 9 layers"),
        (("--num-experts", 3, "--moe-layer-freq", "often"), "--moe-layer-freq often: neither a number nor a pattern"),
    ],
)
def test_flags_that_do_not_fit(
    flags: tuple, words: str, dense: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    assert words in refuse("import", "--hf", dense, "--save", tmp_path / "out", *flags)


def test_existing_target_needs_overwrite(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    assert "--overwrite" in refuse("import", "--hf", dense, "--save", tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "data"
    run("import", "--hf", dense, "--save", tmp_path / "out", "--overwrite")
    assert not (tmp_path / "out" / "precious").exists()
    resolve_checkpoint(tmp_path / "out")


def test_target_is_the_source(dense: Path, refuse: Callable[..., str]) -> None:
    assert "must lie apart" in refuse("import", "--hf", dense, "--save", dense, "--overwrite")


class FullDisk:
    """`open`, whose files take `room` bytes in all."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, path: Path, mode: str = "r", *arguments: object) -> object:
        stream = open(path, mode, *arguments)  # noqa: SIM115 - closed by the code under test
        if "w" not in mode:
            return stream
        write = stream.write

        def limited(block: bytes) -> int:
            self.room -= len(block)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(block)

        return _Stream(stream, limited)


class _Stream:
    def __init__(self, stream: object, write: Callable[[bytes], int]) -> None:
        self.stream, self.write = stream, write

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *arguments: object) -> None:
        self.stream.close()


def test_disk_full_while_importing(
    dense: Path, tmp_path: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "open", FullDisk(100_000), raising=False)
    assert "No space left on device" in refuse("import", "--hf", dense, "--save", tmp_path / "out")


def test_disk_full_while_exporting(
    dense: Path, tmp_path: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("import", "--hf", dense, "--save", tmp_path / "checkpoint")
    monkeypatch.setattr(safetensors_writer, "open", FullDisk(100_000), raising=False)
    assert "No space left on device" in refuse("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "out")


def test_too_little_space_is_said_before_any_work(
    dense: Path, tmp_path: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    assert "no space left" in refuse("import", "--hf", dense, "--save", tmp_path / "out")


def test_file_size_limit_of_a_real_process(dense: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, TOOL, "import", "--hf", dense, "--save", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limit, env=environment, check=False, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: File too large")
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def checkpoint(dense: Path, tmp_path: Path) -> Path:
    """An upcycled checkpoint that the test may spoil."""
    run("import", "--hf", dense, "--save", tmp_path / "checkpoint", "--num-experts", 3)
    return tmp_path / "checkpoint"


def test_checkpoint_tensors_that_do_not_fit(checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    router = "decoder.layers.1.mlp.router.weight"
    rewrite_checkpoint(checkpoint, lambda tensors: tensors.update({router: torch.ones(4, 32)}))
    line = refuse("export", "--load", checkpoint, "--hf", tmp_path / "out")
    assert f"{router} has shape [4, 32], the model wants [3, 32]" in line
    rewrite_checkpoint(checkpoint, lambda tensors: tensors.pop(router))
    assert f"lacks {router}" in refuse("export", "--load", checkpoint, "--hf", tmp_path / "out")


def test_checkpoint_tensor_too_many(checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    rewrite_checkpoint(checkpoint, lambda tensors: tensors.update({"decoder.layers.3.odd": torch.ones(1)}))
    assert "no place for decoder.layers.3.odd" in refuse("export", "--load", checkpoint, "--hf", tmp_path / "out")


def test_truncated_checkpoint(checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    file = next(checkpoint.rglob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    line = refuse("export", "--load", checkpoint, "--hf", tmp_path / "out")
    assert file.name in line and "bytes, " in line and "were written" in line
    line = refuse("export", "--load", checkpoint, "--hf", tmp_path / "out", "--no-verify")
    assert file.name in line


@pytest.mark.parametrize("name", [".metadata", "moe_lpr/card.json", "moe_lpr/config.json"])
def test_incomplete_checkpoint(name: str, checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (checkpoint / "release" / name).unlink()
    assert Path(name).name in refuse("export", "--load", checkpoint, "--hf", tmp_path / "out")


def test_no_checkpoint(tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert "no such directory" in refuse("export", "--load", tmp_path / "none", "--hf", tmp_path / "out")
    assert "no checkpoint here" in refuse("export", "--load", tmp_path, "--hf", tmp_path.parent / "out")


@pytest.mark.parametrize("size", ["5XB", "-1GB", "much"])
def test_shard_size_that_is_none(size: str, checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    line = refuse("export", "--load", checkpoint, "--hf", tmp_path / "out", f"--max-shard-size={size}")
    assert "--max-shard-size" in line


def test_attention_biases_that_are_not_zero(
    tmp_path: Path, dense_directory: Callable, refuse: Callable[..., str]
) -> None:
    llama = Path(shutil.copytree(dense_directory("llama"), tmp_path / "llama"))
    change_config(llama, attention_bias=True)
    name = "model.layers.2.self_attn.o_proj.bias"

    def add(tensors: Tensors) -> None:
        for layer in range(3):
            for projection, size in {"q": 32, "k": 16, "v": 16, "o": 32}.items():
                tensors[f"model.layers.{layer}.self_attn.{projection}_proj.bias"] = torch.zeros(size)
        tensors[name][5] = 0.1

    change_hf(llama, add)
    line = refuse("import", "--hf", llama, "--save", tmp_path / "out")
    assert f"{name} is not zero" in line and "no place for attention biases" in line


def test_dense_layer_whose_experts_were_changed(
    tmp_path: Path, dense_directory: Callable, refuse: Callable[..., str]
) -> None:
    arguments = ("--num-experts", 3, "--moe-layer-freq", 2)
    run("import", "--hf", dense_directory("llama"), "--save", tmp_path / "checkpoint", *arguments)
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "moe")
    expert = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    change_hf(tmp_path / "moe", lambda tensors: tensors[expert].mul_(2))
    line = refuse("import", "--hf", tmp_path / "moe", "--save", tmp_path / "out")
    assert f"{expert} is not equal to model.layers.1.block_sparse_moe.experts.0.w3.weight" in line


def test_unequal_expert_counts(checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    card = checkpoint / "release" / "moe_lpr" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"experts_per_layer": [3, 2, 3]}))
    write_manifest(card.parents[1], {})
    line = refuse("export", "--load", checkpoint, "--hf", tmp_path / "out")
    assert "different numbers of experts (2, 3)" in line


def test_card_of_a_newer_version(checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    card = checkpoint / "release" / "moe_lpr" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"format_version": 99}))
    write_manifest(card.parents[1], {})
    assert "install a newer" in refuse("export", "--load", checkpoint, "--hf", tmp_path / "out")


def test_qwen2_moe_with_a_shared_expert_of_its_own(
    checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    run("export", "--load", checkpoint, "--hf", tmp_path / "moe")
    name = "model.layers.0.mlp.shared_expert.up_proj.weight"
    change_hf(tmp_path / "moe", lambda tensors: tensors.update({name: torch.ones(128, 32)}))
    line = refuse("import", "--hf", tmp_path / "moe", "--save", tmp_path / "out")
    assert f"{name} is not zero" in line


def test_flags_that_contradict_the_source(checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    run("export", "--load", checkpoint, "--hf", tmp_path / "moe")
    for flags in (("--num-experts", 4), ("--top-k", 3), ("--moe-layer-freq", 2)):
        assert flags[0] in refuse("import", "--hf", tmp_path / "moe", "--save", tmp_path / "out", *flags)


def write_bad_adapter(directory: Path, config: dict, tensors: Tensors) -> Path:
    directory.mkdir()
    fields = {"peft_type": "MOE", "num_experts": 2, "topk": 2, "layers_to_transform": [0]} | config
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LORA"}, "'LORA'"),
        ({"layers_to_transform": [7]}, "layer 7"),
        ({"topk": 5}, "topk=5"),
        ({}, "lack base_model.model.model.layers.0.mlp.moe_router_embedding.weight"),
    ],
)
def test_bad_adapters(config: dict, words: str, dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    adapter = write_bad_adapter(tmp_path / "adapter", config, {"odd": torch.ones(1)})
    assert words in refuse("import", "--hf", dense, "--adapter", adapter, "--save", tmp_path / "out")


def test_weights_that_are_not_finite_are_not_imported(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_hf(dense, lambda tensors: tensors[name].view(-1)[:1].fill_(torch.nan))
    line = refuse("import", "--hf", dense, "--save", tmp_path / "out")
    assert f"model.safetensors: {name} holds NaN or infinite values" in line


def test_weights_that_are_not_finite_are_not_exported(
    checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    router = "decoder.layers.1.mlp.router.weight"
    rewrite_checkpoint(checkpoint, lambda tensors: tensors[router].view(-1)[:1].fill_(torch.inf))
    line = refuse("export", "--load", checkpoint, "--hf", tmp_path / "out")
    assert f"{router} holds NaN or infinite values" in line


def test_a_billion_experts_in_a_card_take_no_memory(
    checkpoint: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    card = checkpoint / "release" / "moe_lpr" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"experts_per_layer": [10**9] * 3}))
    line = refuse("export", "--load", checkpoint, "--hf", tmp_path / "out")
    assert "card.json: experts_per_layer: a layer has 1 to 1,024 experts, not 1000000000" in line


def test_overlapping_tensors(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    path = dense / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight"
    header[first]["data_offsets"] = header[second]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    line = refuse("import", "--hf", dense, "--save", tmp_path / "out")
    assert "model.safetensors" in line and "lies over" in line
