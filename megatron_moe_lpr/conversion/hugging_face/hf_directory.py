"""A Hugging Face directory: its configuration files, names and shapes of its tensors, and files that are copied."""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, read_card, read_json
from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, CONFIG_FILE, SIDE_DIRECTORY
from megatron_moe_lpr.checkpoint.format.reader import TensorInfo
from megatron_moe_lpr.conversion.hugging_face.hf_config import (
    DENSE_FAMILY_OF_MOE,
    dense_config,
    moe_config,
    stock_experts_per_layer,
    stock_top_k,
    with_expert_count,
    without_dtype,
    without_foreign_fields,
)
from megatron_moe_lpr.conversion.hugging_face.llama_cpp import LLAMA_CPP_MODEL_TYPE
from megatron_moe_lpr.conversion.hugging_face.other_forms import refuse_other_directories
from megatron_moe_lpr.conversion.hugging_face.other_tensors import foreign_form
from megatron_moe_lpr.conversion.hugging_face.safetensors_source import INDEX_FILE, SafetensorsSource, weight_files
from megatron_moe_lpr.conversion.hugging_face.split_source import SplitSource
from megatron_moe_lpr.conversion.hugging_face.stock_fields import SHARED_EXPERT_WIDTH
from megatron_moe_lpr.conversion.tensors.extra_tensors import ExtraTensor, extra_tensors, zero_attention_biases
from megatron_moe_lpr.conversion.tensors.fused import StoredForm, stored_tensors
from megatron_moe_lpr.data.tokenizer_extension import EXTENSION_FILE
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.checksums import sha256_of_file
from megatron_moe_lpr.files.json_files import checked_integer, required_int
from megatron_moe_lpr.files.lfs_pointers import refuse_lfs_pointers
from megatron_moe_lpr.files.links import copy_private, file_inside, tree_inside
from megatron_moe_lpr.model.configuration.architecture import MAX_SIZE, MAX_VOCABULARY, Architecture, read_architecture
from megatron_moe_lpr.model.configuration.families import MIXTURES
from megatron_moe_lpr.model.configuration.parameters import Shape
from megatron_moe_lpr.model.tensors import (
    DENSE_LAYOUT,
    EMBEDDING_NAME,
    MOE_LAYOUTS,
    OUTPUT_NAME,
    Layout,
    Row,
)

TOKENIZER_PATTERNS = (
    "tokenizer*",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "tekken.json",
    EXTENSION_FILE,
)
# Those of them that hold tokens: an extended tokenizer replaces them all.
VOCABULARY_PATTERNS = (
    "tokenizer.json",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "*.model",
    "tekken.json",
    EXTENSION_FILE,
)
CHAT_TEMPLATES = "additional_chat_templates"
# README.md is the base model's model card, which names the licence for the export. Licences demand their files.
CARRIED_PATTERNS = (
    *TOKENIZER_PATTERNS,
    CHAT_TEMPLATES,
    "generation_config.json",
    "README.md",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)
TRAINING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Buffers that old checkpoints store and every reader computes.
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclasses.dataclass(frozen=True)
class HFDirectory:
    """A dense or stock MoE model in a Hugging Face directory."""

    path: Path
    config: dict[str, Any]
    """The base model's configuration, also for a directory of an upcycled model or of one with more experts or an
    extended vocabulary."""
    architecture: Architecture
    layout: Layout
    experts_per_layer: list[int]
    top_k: int
    shared_expert_width: int
    card: CheckpointCard | None
    """Checkpoint card; None: the directory was not written by this project's export."""

    @property
    def is_moe(self) -> bool:
        """Whether the directory holds a stock MoE."""
        return self.layout is not DENSE_LAYOUT

    @property
    def stored_form(self) -> StoredForm:
        """How its files store tensors."""
        family = self.architecture.family
        return StoredForm(family.moe_model_type if self.is_moe else family.name, self.architecture.head_dim)

    @property
    def new_tokens(self) -> list[int]:
        """Rows that vocabulary extensions added below those of `architecture.vocab_size`, the oldest one first."""
        return self.card.new_tokens if self.card else []

    def extra(self) -> list[ExtraTensor]:
        """Return the tensors that the stock architecture has and the upcycled model does not."""
        extra = extra_tensors(self.architecture, self.experts_per_layer, self.layout, self.shared_expert_width)
        if self.config.get("attention_bias") and not self.is_moe and not self.architecture.family.qkv_bias:
            extra += zero_attention_biases(self.architecture)
        return extra

    def source(self) -> SafetensorsSource:
        """Open the weights. Raises UserError if a file is missing or damaged."""
        return SafetensorsSource(weight_files(self.path))


def open_hf_directory(path: Path, upcycled_elsewhere: bool = False) -> HFDirectory:
    """Read the configuration files of a Hugging Face directory.

    Args:
        upcycled_elsewhere: a stock MoE without a card is a dense model that another program upcycled, with the dense
            FFN as expert 0; otherwise it is a mixture, all of whose experts are original ones.

    Raises:
        UserError: not such a directory, or an unsupported architecture.
    """
    path = Path(path)
    refuse_other_directories(path)
    refuse_lfs_pointers(path, (CONFIG_FILE, INDEX_FILE, *CARRIED_PATTERNS))
    config_path = path / CONFIG_FILE
    config = read_json(file_inside(config_path, path))
    model_type = config.get("model_type")
    if model_type == LLAMA_CPP_MODEL_TYPE:
        raise UserError(f"{config_path}: written for llama.cpp alone; use the export for transformers")
    config = _without_new_rows(config, _card(path), path)
    if isinstance(model_type, str) and (model_type in DENSE_FAMILY_OF_MOE or model_type in MIXTURES):
        return _open_moe(path, config, upcycled_elsewhere)
    architecture = read_architecture(config, str(config_path))
    layers = [1] * architecture.num_layers
    return HFDirectory(path, config, architecture, DENSE_LAYOUT, layers, 1, 0, _card(path))


def _without_new_rows(config: dict[str, Any], card: CheckpointCard | None, path: Path) -> dict[str, Any]:
    """The configuration with the dense model's `vocab_size`, without the rows of vocabulary extensions."""
    if card is None or not card.added_rows:
        return config
    size = required_int(config, "vocab_size", str(path / CONFIG_FILE), 1, MAX_VOCABULARY)
    if size <= card.added_rows:
        raise UserError(f"{path / SIDE_DIRECTORY}: does not belong to {path / CONFIG_FILE}; remove it")
    return config | {"vocab_size": size - card.added_rows}


def _open_moe(path: Path, moe: dict[str, Any], upcycled_elsewhere: bool) -> HFDirectory:
    source = str(path / CONFIG_FILE)
    experts, card = stock_experts_per_layer(moe, source), _card(path)
    is_mixture = card.has_mixture_base if card else moe["model_type"] in MIXTURES and not upcycled_elsewhere
    config = moe if is_mixture and not card else _dense_configuration(path, moe, card)
    architecture = read_architecture(config, source)
    layout = MOE_LAYOUTS[moe["model_type"]]
    top_k = architecture.mixture.top_k if architecture.mixture else stock_top_k(moe, source)
    if card and experts != card.experts_per_layer and experts == [card.num_experts] * len(card.experts_per_layer):
        layout, experts = dataclasses.replace(layout, experts_everywhere=True), card.experts_per_layer
    if architecture.family.moe_model_type != moe["model_type"] or (card and card.experts_per_layer != experts):
        raise UserError(f"{path / SIDE_DIRECTORY}: does not belong to {source}; export the model again")
    width = moe.get("shared_expert_intermediate_size") or SHARED_EXPERT_WIDTH
    checked_integer(width, "shared_expert_intermediate_size", source, 1, MAX_SIZE)
    return HFDirectory(path, config, architecture, layout, experts, top_k, width, card)


def _dense_configuration(path: Path, moe: dict[str, Any], card: CheckpointCard | None) -> dict[str, Any]:
    """Return the dense configuration: the one kept by the export, unless `config.json` was edited since the export.

    Raises:
        UserError: the configuration is not that of an upcycled model.
    """
    if not card:
        if moe["model_type"] not in DENSE_FAMILY_OF_MOE:
            raise UserError(f"{path / CONFIG_FILE}: no dense model that is known here becomes a mixture of this kind")
        return dense_config(moe, str(path / CONFIG_FILE))
    side = path / SIDE_DIRECTORY / CONFIG_FILE
    kept = read_json(file_inside(side, path))
    with contextlib.suppress(UserError):  # a card of another model; what does not fit is refused below
        architecture = read_architecture(kept, str(side))
        written = moe_config(kept, architecture, card.experts_per_layer, card.top_k)
        if without_dtype(without_foreign_fields(moe)) == without_dtype(written):
            return kept
    if card.has_mixture_base:
        return with_expert_count(moe, max(card.base_experts))
    return dense_config(moe, str(path / CONFIG_FILE), card.family)


def _card(path: Path) -> CheckpointCard | None:
    card = file_inside(path / SIDE_DIRECTORY / CARD_FILE, path)
    return read_card(card) if card.is_file() else None


def check_tensors(
    rows: list[Row], extra: list[ExtraTensor], source: SafetensorsSource, place: Path, form: StoredForm
) -> SafetensorsSource:
    """Check that `source` holds exactly the tensors of `rows` and `extra`, in their shapes.

    Args:
        place: directory for messages.
        form: how the checkpoint stores its tensors.

    Returns:
        The tensors under the names of `rows`, parts of fused ones apart.

    Raises:
        UserError: a tensor is missing, unexpected or of the wrong shape; the message names it.
    """
    parts: dict[str, Shape] = {}
    for row in rows:
        # Of a tensor that several rows share, the last one tells where it ends.
        shapes = [(row.rows[1], *shape[1:]) for shape in row.shapes] if row.rows else row.shapes
        parts |= dict(zip(row.names, shapes, strict=False))
    parts |= {tensor.name: tensor.shape for tensor in extra}
    stored = stored_tensors(parts, form)
    apart = {part for tensor in stored for part in tensor.parts}
    expected = {name: shape for name, shape in parts.items() if name not in apart}
    expected |= {tensor.name: tensor.shape(parts) for tensor in stored}
    foreign = foreign_form(source.tensors)
    if foreign:
        raise UserError(f"{place}: {foreign}")
    missing = [name for name in expected if name not in source.tensors]
    unexpected = [name for name in source.tensors if name not in expected and not _harmless(name, source)]
    _refuse_output_layer(missing, unexpected, source, place)
    if missing:
        raise UserError(f"{place}: the weights lack {_listed(missing)}")
    if unexpected:
        raise UserError(f"{place}: the architecture has no place for {_listed(unexpected)}")
    for name, shape in expected.items():
        found = source.tensors[name].shape
        if found != shape:
            reason = f"{source.file(name)}: {name} has shape {list(found)}, config.json wants {list(shape)}"
            is_vocabulary = name in (EMBEDDING_NAME, OUTPUT_NAME) and found[1:] == shape[1:]
            raise UserError(reason + (f"; correct its vocab_size of {shape[0]}" if is_vocabulary else ""))
    return SplitSource(source, stored, parts) if stored else source


def _refuse_output_layer(missing: list[str], unexpected: list[str], source: SafetensorsSource, place: Path) -> None:
    """Refuse weights with an output layer if config.json ties it to the embedding, and weights without if not."""
    if missing == [OUTPUT_NAME]:
        raise UserError(
            f"{place}: the weights lack {OUTPUT_NAME}, and config.json does not say tie_word_embeddings=true: set it "
            f"if the model's output layer is its {EMBEDDING_NAME}; else the output layer was lost (as in a classifier "
            "or an embedding model): use the checkpoint of the ...ForCausalLM class"
        )
    if OUTPUT_NAME in unexpected and EMBEDDING_NAME in source.tensors:
        raise UserError(
            f"{source.file(OUTPUT_NAME)}: {OUTPUT_NAME} is not equal to {EMBEDDING_NAME}, and config.json says "
            "tie_word_embeddings=true, which makes them one: set it to false if the model was trained with this output "
            f"layer, or remove {OUTPUT_NAME} from the file if it is a leftover"
        )


def common_dtype(infos: list[TensorInfo], place: Path) -> torch.dtype:
    """Return the dtype that all original matrices have.

    Norms and biases, which have one dimension, may have other floating-point dtypes, which are kept.

    Raises:
        UserError: the matrices have several dtypes, or one that is not in `TRAINING_DTYPES`.
    """
    dtypes = {info.dtype for info in infos if len(info.shape) > 1 or info.dtype not in TRAINING_DTYPES}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"{place}: the weights mix the dtypes {names}; save the model in one of them")
    dtype = dtypes.pop()
    if dtype not in TRAINING_DTYPES:
        raise UserError(f"{place}: weights of dtype {dtype} are not supported; convert from the bf16 checkpoint")
    return dtype


def check_trained_dtypes(names: Iterable[str], source: SafetensorsSource) -> None:
    """Check that tensors, which keep their dtypes in a checkpoint, have dtypes of `TRAINING_DTYPES`.

    Raises:
        UserError: a tensor has another dtype; the message names it.
    """
    for name in names:
        dtype = source.tensors[name].dtype
        if dtype not in TRAINING_DTYPES:
            raise UserError(f"{source.file(name)}: {name} has dtype {dtype}; float32, bfloat16 or float16 is expected")


def _harmless(name: str, source: SafetensorsSource) -> bool:
    if name.endswith(HARMLESS_SUFFIXES):
        return True
    # Some tools save the tied output layer too; different values would mean that it is not tied.
    has_both = name == OUTPUT_NAME and EMBEDDING_NAME in source.tensors
    return has_both and torch.equal(source.read(name), source.read(EMBEDDING_NAME))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def carried_files(directory: Path) -> dict[str, Path]:
    """Return tokenizer, chat templates, generation settings, licences and model card, by relative path.

    Raises:
        UserError: a file is a symbolic link that leads out of the directory.
        OSError: a file cannot be read.
    """
    files: dict[str, Path] = {}
    for pattern in CARRIED_PATTERNS:
        for path in sorted(directory.glob(pattern)):
            real = file_inside(path, directory)
            if real.is_file():
                files[path.name] = real
            elif real.is_dir() and path.name == CHAT_TEMPLATES:
                files |= {f"{path.name}/{name}": file for name, file in tree_inside(path, directory).items()}
    for file in files.values():
        with open(file, "rb"):
            pass
    return files


def carry_files(files: Mapping[str, Path], target: Path) -> None:
    """Copy the files of `carried_files` into the directory `target`."""
    for name, file in files.items():
        copy_private(file, target / name)


def with_tokenizer(files: Mapping[str, Path], tokenizer: Path) -> dict[str, Path]:
    """Return a model's files of `carried_files` with the tokenizer of another directory, an extended one.

    Chat templates and settings that the directory lacks stay; no file with the old vocabulary does.
    """
    kept = {name: file for name, file in files.items() if not _matches(name, VOCABULARY_PATTERNS)}
    return kept | _tokenizer_files(carried_files(tokenizer))


def with_vocabulary(files: Mapping[str, Path], tokenizer: Path) -> dict[str, Path]:
    """Return a model's files of `carried_files` with the vocabulary of another directory, an extended one.

    Chat template, settings and special tokens' roles are the model's.
    """
    kept = {name: file for name, file in files.items() if not _matches(name, VOCABULARY_PATTERNS)}
    other = {name: file for name, file in carried_files(tokenizer).items() if _matches(name, VOCABULARY_PATTERNS)}
    return kept | other


def tokenizer_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of each tokenizer file among the files of `carried_files`, by name."""
    return {name: sha256_of_file(file) for name, file in sorted(_tokenizer_files(files).items())}


def _tokenizer_files(files: Mapping[str, Path]) -> dict[str, Path]:
    return {name: file for name, file in files.items() if _matches(name, TOKENIZER_PATTERNS)}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    # Files in a directory, as further chat templates, have a slash in their names.
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
