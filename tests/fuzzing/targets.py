"""Every reader of this project, each with a valid file to corrupt."""

import dataclasses
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis.strategies import SearchStrategy
from megatron.core.datasets.indexed_dataset import IndexedDataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, EarlierTokenizer, read_card
from megatron_moe_lpr.checkpoint.format.directory import CheckpointDirectory, resolve_checkpoint
from megatron_moe_lpr.checkpoint.format.reader import CheckpointReader
from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.conversion.hugging_face.adapter import open_adapter
from megatron_moe_lpr.conversion.hugging_face.hf_directory import open_hf_directory
from megatron_moe_lpr.conversion.hugging_face.safetensors_source import SafetensorsSource, weight_files
from megatron_moe_lpr.conversion.tensors.new_rows import initial_rows
from megatron_moe_lpr.conversion.verification.inspection import inspect_directory, print_inspection
from megatron_moe_lpr.data.indexed import check_index, open_tokens
from megatron_moe_lpr.data.manifest import read_manifest
from megatron_moe_lpr.data.preparation.documents import DocumentOptions, read_documents
from megatron_moe_lpr.data.preparation.inspection import counts_table
from megatron_moe_lpr.data.preparation.merging import expand_prefixes
from megatron_moe_lpr.data.preparation.sources import Block
from megatron_moe_lpr.data.tokenizer import load_tokenizer, model_vocabulary
from megatron_moe_lpr.data.tokenizer_extension import read_extension
from megatron_moe_lpr.data.tokenizer_settings import added_tokens
from megatron_moe_lpr.data.vocabulary_extension import tokenizers_before
from megatron_moe_lpr.evaluation.report.inputs import read_inputs
from megatron_moe_lpr.evaluation.report.page import build_page
from megatron_moe_lpr.files import checksum_file
from megatron_moe_lpr.model.transformer.rope import inverse_frequencies
from megatron_moe_lpr.training.logs.metrics_file import MetricsFile
from tests.data.builders import write_dataset
from tests.fuzzing import pickles
from tests.fuzzing.inputs import hostile_files

DENSE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
MOE = DENSE | {
    "model_type": "qwen2_moe", "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "moe_intermediate_size": 64, "mlp_only_layers": [0], "decoder_sparse_step": 1, "rope_scaling": None,
    "shared_expert_intermediate_size": 128,
}  # fmt: skip
CARD = CheckpointCard("llama", [3, 1], 2, "float32", "sha256:00", 1, {"tokenizer.json": "00"}, {"torch": "2"}, [{}])
CARD.new_tokens, CARD.earlier_tokenizers = [3, 5], [EarlierTokenizer("00", ["en"]), EarlierTokenizer("01", [])]
EXTENSION = {
    "format": 1, "base_vocab_size": 10, "new_tokens": 2, "base_tokenizer_fingerprint": "aa",
    "tokenizer_fingerprint": "bb", "guarded": {"en": {"documents": 9, "changed": 0}}, "pieces": [[1, 2], [3, 4, 9]],
}  # fmt: skip
EVALUATION = {
    "datasets": [
        {"language": name, "group": group, "tokens": 10, "bits_per_byte": 2.0,
         "routing": {"expert0_top_k_share": [0.5, None]}}
        for name, group in (("en", "original"), ("el", "expanded"))
    ],
    "averages": {group: {"bits_per_byte": 2.0, "expert0_top_k_share": 0.5} for group in ("original", "expanded")},
    "experts_per_layer": [3, 1], "top_k": 2, "sequence_length": 8,
}  # fmt: skip
METRICS = b'{"kind": "train", "iteration": 1, "consumed_tokens": 8, "lm_loss/el": 4.0}\n'


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader: `prepare` writes a valid file and the files beside it, `read` reads the corrupted file."""

    prepare: Callable[[Path], Path]
    read: Callable[[Path], object]
    hostile: Callable[[bytes], SearchStrategy[bytes]] = hostile_files
    """From the bytes of the valid file to a strategy of hostile ones."""


def _json_file(name: str, content: object) -> Callable[[Path], Path]:
    def prepare(root: Path) -> Path:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content), encoding="utf-8")
        return root / name

    return prepare


def _safetensors(root: Path) -> Path:
    path = root / "model.safetensors"
    save_file({"a": torch.ones(4, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, path)
    return path


def _weight_map(root: Path) -> Path:
    # Not under the name of a single file, which would be read instead.
    _safetensors(root).rename(root / "shard.safetensors")
    return _json_file("model.safetensors.index.json", {"weight_map": {"a": "shard.safetensors"}})(root)


def _read_safetensors(path: Path) -> None:
    source = SafetensorsSource([path])
    for name in source.tensors:
        source.read(name)


def _read_config(path: Path) -> None:
    model = open_hf_directory(path.parent)
    inverse_frequencies(model.architecture.rope, model.architecture.head_dim)
    with open("/dev/null", "w") as nowhere:
        from rich.console import Console

        print_inspection(path, inspect_directory(path.parent), Console(file=nowhere))


def _card(root: Path) -> Path:
    CARD.write(root / "card.json")
    return root / "card.json"


def _read_card(path: Path) -> None:
    read_card(path).write(path.with_name("again.json"))


def _adapter(root: Path) -> Path:
    (root / "adapter_model.safetensors").write_bytes(b"")
    fields = {"peft_type": "MOE", "num_experts": 3, "topk": 2, "layers_to_transform": [0, 1]}
    return _json_file("adapter_config.json", fields)(root)


def _dataset(root: Path) -> str:
    return write_dataset(root / "x", "el", [[1, 2, 3, 0], [4, 0], [5, 6, 0]])


def _read_dataset(path: Path) -> None:
    prefix = str(path.with_suffix(""))
    manifest = read_manifest(prefix)
    check_index(prefix, manifest.dtype, manifest.tokens)
    counts_table({prefix: manifest})
    open_tokens(prefix, np.dtype(manifest.dtype))
    expand_prefixes([prefix])
    dataset = IndexedDataset(prefix)
    for index in range(len(dataset)):
        dataset[index]


def _read_lines(path: Path) -> None:
    block = Block(str(path), path.read_bytes(), 1, 0, False, 0)
    options = DocumentOptions(language_key="lang")
    for _, text in read_documents(block, options, Counter(), {}):
        text.encode("utf-8")


def _checkpoint(root: Path) -> Path:
    directory = root / "release"
    with CheckpointWriter(directory, {}) as writer:
        writer.write("decoder.a", torch.ones(4, 3))
        writer.write("decoder.b", torch.zeros(2, dtype=torch.bfloat16))
    return directory / ".metadata"


def _old_checkpoint(root: Path) -> Path:
    """An index in protocol 2, whose opcodes differ, as another tool may write it."""
    path = _checkpoint(root)
    # Written by the line above; to write it in another protocol it has to be read whole.
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=2))
    return path


def _tensors(root: Path) -> Path:
    return next(_checkpoint(root).parent.glob("*.distcp"))


def _read_checkpoint(path: Path) -> None:
    reader = CheckpointReader(path.parent)
    for key in reader.tensors:
        reader.read(key)


def _latest(root: Path) -> Path:
    _checkpoint(root)
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return root / "latest_checkpointed_iteration.txt"


def _checksums(root: Path) -> Path:
    directory = _checkpoint(root).parent
    checksum_file.write_checksums(directory, {})
    return directory / checksum_file.CHECKSUM_FILE


def _tokenizer(root: Path) -> Path:
    Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")).save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    _json_file("config.json", {"eos_token_id": 0, "vocab_size": 900})(root)
    return root / "tokenizer_config.json"


def _read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path.parent)
    model_vocabulary(tokenizer.path)
    assert tokenizer.eod >= 0


def _metrics(root: Path) -> Path:
    (root / "metrics.jsonl").write_bytes(METRICS * 3)
    return _json_file("e.json", EVALUATION)(root).with_name("metrics.jsonl")


def _read_metrics(path: Path) -> None:
    MetricsFile(path.with_name("again.jsonl"), 0)
    path.with_name("copy.jsonl").write_bytes(path.read_bytes())
    MetricsFile(path.with_name("copy.jsonl"), 1).append("train", 1, {"lm_loss/el": 1.0})
    read_inputs([f"t={path.with_name('e.json')}"], [f"t={path}"], None)


def _read_extension(path: Path) -> None:
    extension = read_extension(path.parent)
    tokenizers_before(extension, CARD.earlier_tokenizers)
    initial_rows(torch.zeros(10, 4), extension.pieces)


def _read_evaluation(path: Path) -> None:
    build_page(read_inputs([f"a={path}", f"b={path}"], [], None))


TARGETS = {
    "safetensors": Target(_safetensors, _read_safetensors),
    "weight map": Target(_weight_map, lambda path: weight_files(path.parent)),
    "config": Target(_json_file("config.json", DENSE), _read_config),
    "MoE config": Target(_json_file("config.json", MOE), _read_config),
    "checkpoint config": Target(
        _json_file("moe_lpr/config.json", DENSE), lambda path: CheckpointDirectory(path.parents[1], None).architecture()
    ),
    "card": Target(_card, _read_card),
    "adapter": Target(_adapter, lambda path: open_adapter(path.parent).experts_per_layer(4)),
    "manifest": Target(lambda root: Path(f"{_dataset(root)}.json"), _read_dataset),
    "index": Target(lambda root: Path(f"{_dataset(root)}.idx"), _read_dataset),
    "JSON lines": Target(_json_file("x.jsonl", {"text": "one \u03b1", "lang": "el"}), _read_lines),
    "metadata": Target(_checkpoint, _read_checkpoint),
    "metadata, protocol 2": Target(_old_checkpoint, _read_checkpoint),
    "metadata, opcodes": Target(_checkpoint, pickles.read_metadata, pickles.metadata_programs),
    "extra state, opcodes": Target(pickles.extra_state, pickles.read_extra_state, pickles.extra_state_programs),
    "objects, opcodes": Target(pickles.torch_file, pickles.read_torch_file, pickles.torch_file_programs),
    "tensors": Target(_tensors, _read_checkpoint),
    "latest": Target(_latest, lambda path: resolve_checkpoint(path.parent)),
    "checksums": Target(_checksums, lambda path: checksum_file.verify(path.parents[1])),
    "tokenizer config": Target(_tokenizer, _read_tokenizer),
    "added tokens": Target(_json_file("added_tokens.json", {"<|a|>": 5}), lambda path: added_tokens(path.parent)),
    "added tokens of the configuration": Target(
        _json_file("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "<|a|>", "special": True}}}),
        lambda path: added_tokens(path.parent),
    ),
    "vocabulary extension": Target(_json_file("extension.json", EXTENSION | {"earlier": [EXTENSION]}), _read_extension),
    "metrics": Target(_metrics, _read_metrics),
    "evaluation": Target(_json_file("e.json", EVALUATION), _read_evaluation),
}
