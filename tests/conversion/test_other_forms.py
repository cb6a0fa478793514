"""Directories that are no model to import: one line that names the cause and the way out, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.helpers import UPCYCLED_ELSEWHERE, change_config, change_hf, hf_tensors, run
from tests.conversion.tiny_models import load_model, logits, save_model

Tensors = dict[str, torch.Tensor]
Build = Callable[[Path], Path | None]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234567\n"
LINEAR = "model.layers.0.mlp.up_proj"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def refuse(refuse: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Import a directory, which must fail; returns the error line."""
    return lambda directory, *flags: refuse("import", "--hf", directory, "--save", tmp_path / "out", *flags)


def quantised(**parts: torch.Tensor) -> Callable[[Tensors], None]:
    """A matrix replaced by parts: `qweight=...` is LINEAR.qweight; `weight` is the matrix in another dtype."""

    def change(tensors: Tensors) -> None:
        del tensors[f"{LINEAR}.weight"]
        tensors |= {f"{LINEAR}.{name.replace('__', '.')}": tensor for name, tensor in parts.items()}

    return change


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


HALVES = torch.ones(48, 1, dtype=torch.float16)
QUANTISED = {
    "GPTQ": (
        quantised(qweight=integers(4, 48), qzeros=integers(1, 6), scales=HALVES, g_idx=integers(32)),
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        ["GPTQ", "qweight"],
    ),
    "AWQ": (
        quantised(qweight=integers(32, 6), qzeros=integers(1, 6), scales=HALVES),
        {"quant_method": "awq", "bits": 4, "zero_point": True},
        ["AWQ", "qweight"],
    ),
    "MLX": (
        quantised(weight=integers(48, 4, dtype=torch.uint32), scales=HALVES, biases=HALVES * 2),
        {"group_size": 64, "bits": 4},
        ["MLX", "scales"],
    ),
    "bitsandbytes 4 bits": (
        quantised(
            weight=integers(768, 1, dtype=torch.uint8),
            weight__absmax=integers(24, dtype=torch.uint8),
            weight__quant_map=torch.ones(16),
            weight__quant_state__bitsandbytes__nf4=integers(80, dtype=torch.uint8),
        ),
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        ["bitsandbytes, 4 bits"],
    ),
    "bitsandbytes 8 bits": (
        quantised(weight=integers(48, 32, dtype=torch.int8), SCB=torch.ones(48)),
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        ["bitsandbytes, 8 bits", "SCB"],
    ),
    "FP8": (
        quantised(weight=torch.ones(48, 32).to(torch.float8_e4m3fn), weight_scale_inv=torch.ones(1, 1)),
        {"quant_method": "fp8", "fmt": "e4m3"},
        ["FP8", "weight_scale_inv"],
    ),
    "FP8 without scales": (
        quantised(weight=torch.ones(48, 32).to(torch.float8_e5m2)),
        {"quant_method": "fp8"},
        ["stored as float8_e5m2"],
    ),
    "compressed-tensors": (
        quantised(weight_packed=integers(48, 4), weight_scale=HALVES, weight_shape=integers(2)),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        ["compressed-tensors", "weight_packed"],
    ),
    "MXFP4": (
        quantised(
            weight_blocks=integers(48, 1, 16, dtype=torch.uint8), weight_scales=integers(48, 1, dtype=torch.uint8)
        ),
        {"quant_method": "mxfp4"},
        ["MXFP4"],
    ),
    "integers": (quantised(weight=integers(48, 32, dtype=torch.int8)), {"quant_method": "int8"}, ["stored as int8"]),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights(name: str, dense: Path, refuse: Callable[..., str]) -> None:
    change, config, words = QUANTISED[name]
    change_hf(dense, change)
    line = refuse(dense)
    assert all(word in line for word in ("quantised", "bfloat16, float16 or float32", *words)), line
    for field in ("quantization_config", "quantization", "compression_config"):
        change_config(dense, **{field: config})
        line = refuse(dense)
        assert all(word in line for word in ("quantised", "bfloat16, float16 or float32", field)), line
        assert config.get("quant_method", "MLX") in line
        change_config(dense, **{field: None})


def test_a_dtype_that_is_not_known(dense: Path, refuse: Callable[..., str]) -> None:
    name = "model.norm.weight"
    change_hf(dense, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e8m0fnu)}))
    line = refuse(dense)
    assert f"{name}' is stored as 'F8_E8M0'" in line and "bfloat16, float16 or float32" in line


def rename_all(start: str, beginning: str = "") -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(beginning)]:
            tensors[start + name.removeprefix(beginning)] = tensors.pop(name)

    return change


def without_output(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]


def base_class(tensors: Tensors) -> None:
    without_output(tensors)
    rename_all("", "model.")(tensors)


def classifier(tensors: Tensors) -> None:
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:2].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_output, ["lack lm_head.weight", "tie_word_embeddings=true", "ForCausalLM"]),
        (classifier, ["lack lm_head.weight", "classifier"]),
        (base_class, ["lack `model.`", "AutoModelForCausalLM"]),
        (rename_all("module."), ["begin with module.", "DistributedDataParallel"]),
        (rename_all("_orig_mod."), ["torch.compile"]),
        (rename_all("base_model.model."), ["peft's wrapper"]),
        (rename_all("transformer.h.0.", "model.layers.0."), ["another architecture's"]),
        (rename_all("language_model.model.", "model."), ["sees images"]),
        (rename_all(f"{LINEAR}.base_layer.", f"{LINEAR}."), ["not merged", "merge_and_unload()"]),
        (
            lambda tensors: tensors.update({f"{LINEAR}.lora_A.default.weight": torch.ones(2, 32)}),
            ["lora_A", "merge_and_unload()"],
        ),
    ],
)
def test_tensors_of_another_form(
    change: Callable[[Tensors], None], words: list[str], dense: Path, refuse: Callable[..., str]
) -> None:
    change_hf(dense, change)
    line = refuse(dense)
    assert all(word in line for word in words), line


def test_tied_weights_that_differ_and_both_ways_out(tmp_path: Path, refuse: Callable[..., str]) -> None:
    dense = save_model("qwen2-tied", tmp_path / "tied")
    tied = logits(load_model(dense))
    change_hf(dense, lambda tensors: tensors.update({"lm_head.weight": torch.randn(99, 32)}))
    line = refuse(dense)
    assert "model.safetensors: lm_head.weight is not equal to model.embed_tokens.weight" in line
    assert "tie_word_embeddings=true" in line and "set it to false" in line and "remove lm_head.weight" in line
    change_config(dense, tie_word_embeddings=False)
    run("import", "--hf", dense, "--save", tmp_path / "untied", "--num-experts", 2)
    run("export", "--load", tmp_path / "untied", "--hf", tmp_path / "untied-hf")
    assert (logits(load_model(tmp_path / "untied-hf")) - logits(load_model(dense))).abs().max() < 1e-4
    change_config(dense, tie_word_embeddings=True)
    change_hf(dense, without_output)
    run("import", "--hf", dense, "--save", tmp_path / "again", "--num-experts", 2)
    run("export", "--load", tmp_path / "again", "--hf", tmp_path / "tied-hf")
    assert (logits(load_model(tmp_path / "tied-hf")) - tied).abs().max() < 1e-4


def test_an_output_layer_without_its_embedding(tmp_path: Path, refuse: Callable[..., str]) -> None:
    dense = save_model("qwen2-tied", tmp_path / "tied")
    change_hf(dense, rename_all("lm_head.", "model.embed_tokens."))
    assert "lack model.embed_tokens.weight" in refuse(dense)


def test_experts_that_transformers_5_saved_fused(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    run("import", "--hf", dense, "--save", tmp_path / "save", "--num-experts", 3)
    run("export", "--load", tmp_path / "save", "--hf", tmp_path / "moe")
    model = load_model(tmp_path / "moe")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in hf_tensors(tmp_path / "fused"))
    line = refuse(tmp_path / "fused")
    assert "all experts in one tensor" in line and "save_original_format=True" in line
    model.save_pretrained(tmp_path / "split", save_original_format=True)
    run("import", "--hf", tmp_path / "split", "--save", tmp_path / "again", *UPCYCLED_ELSEWHERE)


# Directories ------------------------------------------------------------------------------------------------------


def write(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def lora(dense: Path, kind: str = "LORA") -> None:
    adapter = {"peft_type": kind, "base_model_name_or_path": "Qwen/Qwen2.5-0.5B", "r": 8}
    write(dense / "adapter_config.json", json.dumps(adapter))
    save_file({"base_model.model.model.layers.0.lora_A.weight": torch.ones(8, 32)}, dense / "adapter_model.safetensors")


def lora_alone(dense: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (dense / name).unlink()
    lora(dense)


def lora_with_config(dense: Path) -> None:
    (dense / "model.safetensors").unlink()
    lora(dense)


def authors_adapter(dense: Path) -> None:
    lora_alone(dense)
    lora(dense, "MOE")


def only(*names: str, config: bool = False) -> Build:
    """The weights, and unless `config` also config.json, replaced by empty files of these names."""

    def build(dense: Path) -> None:
        (dense / "model.safetensors").unlink()
        if not config:
            (dense / "config.json").unlink()
        for name in names:
            write(dense / name, "x")

    return build


def cached(dense: Path, chosen: str, snapshot: bool = True) -> Path:
    """The model in a hub cache beside an older snapshot; gives the part of the cache that the user names."""
    home = dense.parent / "huggingface"
    folder = home / "hub" / "models--Qwen--Qwen1.5-1.8B"
    write(folder / "refs" / "main", COMMIT)
    write(folder / "blobs" / "blob")
    (folder / "snapshots").mkdir()
    if snapshot:
        shutil.copytree(dense, folder / "snapshots" / ("a" * 40))
        shutil.copytree(dense, folder / "snapshots" / COMMIT)
    places = {
        "home": home,
        "hub": home / "hub",
        "model": folder,
        "snapshots": folder / "snapshots",
        "refs": folder / "refs",
    }
    return places[chosen]


def incomplete(dense: Path, name: str) -> Path:
    """A snapshot of a hub cache that lacks a file."""
    snapshot = cached(dense, "snapshots") / COMMIT
    (snapshot / name).unlink()
    return snapshot


def pointer(name: str) -> Build:
    return lambda dense: write(dense / name, POINTER) and None


def pointer_shard(dense: Path) -> Path:
    sharded = save_model("qwen2", dense.parent / "sharded", max_shard_size="20KB")
    sorted(sharded.glob("model-*"))[1].write_text(POINTER)
    return sharded


def index_is_missing(dense: Path) -> Path:
    sharded = save_model("qwen2", dense.parent / "sharded", max_shard_size="20KB")
    (sharded / "model.safetensors.index.json").unlink()
    return sharded


def renamed(dense: Path) -> None:
    (dense / "model.safetensors").rename(dense / "model.bf16.safetensors")


def checkpoints_of_a_trainer(dense: Path) -> Path:
    outer = dense.parent / "outputs"
    dense.rename(outer.parent / "moved")
    outer.mkdir()
    return shutil.move(outer.parent / "moved", outer / "checkpoint-500").parent


DIRECTORIES: dict[str, tuple[Build, list[str]]] = {
    "LoRA": (lora_alone, ["adapter", "'LORA'", "Qwen/Qwen2.5-0.5B", "merge_and_unload"]),
    "LoRA with config.json": (lora_with_config, ["is an adapter", "merge_and_unload"]),
    "LoRA beside a model": (lora, ["whole model and an adapter", "adapter_config.json", "move", "merge_and_unload"]),
    "adapter without its configuration": (only("adapter_model.safetensors"), ["an adapter's", "merge_and_unload"]),
    "authors' adapter": (authors_adapter, ["give it by --adapter", "its base by --hf"]),
    "hub cache's model": (lambda dense: cached(dense, "model"), ["give a snapshot in it: /", f"snapshots/{COMMIT}, "]),
    "hub cache's snapshots": (lambda dense: cached(dense, "snapshots"), [f"snapshots/{COMMIT}, "]),
    "hub cache's refs": (lambda dense: cached(dense, "refs"), [f"snapshots/{COMMIT}, "]),
    "hub cache": (lambda dense: cached(dense, "hub"), ["cache of 1 models", f"snapshots/{COMMIT}"]),
    "HF_HOME": (lambda dense: cached(dense, "home"), ["cache of 1 models", f"snapshots/{COMMIT}"]),
    "hub cache, nothing downloaded": (
        lambda dense: cached(dense, "model", snapshot=False),
        ["no snapshot", "hf download Qwen/Qwen1.5-1.8B"],
    ),
    "hub cache's snapshot without weights": (
        lambda dense: incomplete(dense, "model.safetensors"),
        ["not complete", f"hf download Qwen/Qwen1.5-1.8B --revision {COMMIT}"],
    ),
    "hub cache's snapshot without config.json": (
        lambda dense: incomplete(dense, "config.json"),
        ["not complete", f"hf download Qwen/Qwen1.5-1.8B --revision {COMMIT}"],
    ),
    "LFS weights": (pointer("model.safetensors"), ["model.safetensors: is a Git LFS pointer", "git lfs pull"]),
    "LFS shard": (pointer_shard, ["model-00002-of-", "is a Git LFS pointer", "git lfs pull"]),
    "LFS tokenizer.json": (pointer("tokenizer.json"), ["tokenizer.json: is a Git LFS pointer"]),
    "LFS tokenizer.model": (pointer("tokenizer.model"), ["tokenizer.model: is a Git LFS pointer"]),
    "LFS config.json": (pointer("config.json"), ["config.json: is a Git LFS pointer"]),
    "GGUF": (only("model-q4.gguf"), ["only GGUF", "the GGUF file itself"]),
    "GGUF with config.json": (only("model-q4.gguf", config=True), ["only GGUF"]),
    "pickles": (only("pytorch_model.bin", config=True), [".bin", "save_pretrained"]),
    "Mistral's own form": (
        only("params.json", "consolidated.safetensors"),
        ["consolidated", "convert_mistral_weights"],
    ),
    "Mistral's own weights": (only("consolidated.safetensors", config=True), ["consolidated", "model*.safetensors"]),
    "Meta's own form": (only("params.json", "consolidated.00.pth", "tokenizer.model"), ["convert_llama_weights"]),
    "both forms": (only("pytorch_model.bin", "consolidated.safetensors", config=True), [".bin", "save_pretrained"]),
    "TensorFlow": (only("tf_model.h5", config=True), ["TensorFlow", "safetensors"]),
    "another name": (renamed, ["model.bf16.safetensors is not read", "rename"]),
    "index is missing": (index_is_missing, ["shards are here", "index"]),
    "no config.json": (lambda dense: (dense / "config.json").unlink(), ["config.json", "weights are there", "copy it"]),
    "a trainer's output": (
        checkpoints_of_a_trainer,
        ["config.json", "give the directory that has one", "checkpoint-500"],
    ),
    "a file": (lambda dense: dense / "model.safetensors", ["is a file", "directory"]),
    "a hub name": (lambda dense: Path("Qwen/Qwen1.5-1.8B"), ["no such directory", "on the Hugging Face hub"]),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories_that_are_no_model(name: str, dense: Path, refuse: Callable[..., str]) -> None:
    build, words = DIRECTORIES[name]
    directory = build(dense) or dense
    line = refuse(directory)
    assert all(word in line for word in words), line


def test_a_megatron_checkpoint(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    run("import", "--hf", dense, "--save", tmp_path / "save")
    line = refuse(tmp_path / "save")
    assert "is a Megatron checkpoint already" in line and "--load" in line


def test_what_is_no_adapter(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    write(tmp_path / "adapter" / "adapter_config.json", '{"peft_type": "MOE"}')
    cases = {dense: "a whole model is given by --hf alone", tmp_path / "adapter": "copy it from where the adapter"}
    for adapter, words in cases.items():
        assert words in refuse(dense, "--adapter", adapter)


def test_a_model_given_for_a_checkpoint(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("export", "--load", dense, "--hf", tmp_path / "out")
    assert "is a Hugging Face directory, of which moe-lpr import makes one" in capsys.readouterr().err


def test_pointers_that_nobody_reads_are_no_obstacle(dense: Path, tmp_path: Path) -> None:
    """A clone in which only what is needed was pulled."""
    for name in ("pytorch_model.bin", "model.onnx", "consolidated.safetensors"):
        write(dense / name, POINTER)
    run("import", "--hf", dense, "--save", tmp_path / "save")


def test_what_the_message_names_is_imported(dense: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    line = refuse(cached(dense, "hub"))
    snapshot = Path(line.split("give a snapshot in it: ")[1])
    run("import", "--hf", snapshot, "--save", tmp_path / "save")
    assert load_file(snapshot / "model.safetensors")
