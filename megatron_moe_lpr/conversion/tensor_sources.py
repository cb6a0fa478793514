"""Where an import reads each tensor of the new checkpoint from, checked before anything is written."""

import dataclasses
import functools
from pathlib import Path

import torch

from megatron_moe_lpr.conversion.experts_per_layer import FLAG as EXPERTS_FLAG
from megatron_moe_lpr.conversion.hugging_face.adapter import Adapter, open_adapter
from megatron_moe_lpr.conversion.hugging_face.hf_directory import (
    HFDirectory,
    check_tensors,
    check_trained_dtypes,
    common_dtype,
    open_hf_directory,
)
from megatron_moe_lpr.conversion.hugging_face.safetensors_source import SafetensorsSource, weight_files
from megatron_moe_lpr.conversion.import_options import ImportOptions, given_experts, upcycled_experts
from megatron_moe_lpr.conversion.imported_languages import ImportedLanguages, read_imported_languages
from megatron_moe_lpr.conversion.tensors.blocks import FLAG, inserted_positions, mark_inserted
from megatron_moe_lpr.data.tokenizer_extension import TokenizerExtension
from megatron_moe_lpr.data.vocabulary_extension import open_extension
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.tensors import ADAPTER_LAYOUT, Row, model_rows
from megatron_moe_lpr.parallel.experts import check_expert_parallel


@dataclasses.dataclass(frozen=True)
class TensorSources:
    """The tensors of the checkpoint that an import writes, and the files that they are read from."""

    model: HFDirectory
    adapter: Adapter | None
    experts_per_layer: list[int]
    top_k: int
    seed: int
    """Seed of routers that the source lacks."""
    rows: list[Row]
    """Every tensor of the checkpoint, with its names in `files`."""
    files: SafetensorsSource
    dtype: torch.dtype
    """The dtype of the dense model's matrices."""
    inserted_blocks: list[int]
    """Layers that block expansion inserted, numbered as in the checkpoint."""
    inserts: bool
    """This import inserts these blocks; otherwise the source has them already."""
    languages: ImportedLanguages | None
    """Languages of experts that were trained elsewhere, where the user gives them."""
    new_tokens: list[int]
    """Rows that vocabulary extensions add, the oldest one first."""
    extension: TokenizerExtension | None = None
    """The extension that this import makes, the last one; None: it makes none."""

    @property
    def initialises_routers(self) -> bool:
        """The source has no routers, so that they are drawn."""
        return any(row.kind is ParameterKind.ROUTER and not row.names for row in self.rows)

    def makes(self, row: Row) -> bool:
        """Whether these rows of the vocabulary are made by this import and not read."""
        return self.extension is not None and row.kind is ParameterKind.NEW_ROWS

    def stored_dtype(self, row: Row) -> torch.dtype:
        """The dtype of a tensor in the checkpoint: the source's own; routers are float32.

        Query, key and value become one tensor: where their biases differ in dtype, in one that holds them all exactly.
        The dense model's rows of a vocabulary that training extended have the dtype of its other matrices: an export
        writes them in one tensor with the new rows, whose dtype may be wider.
        """
        if row.kind is ParameterKind.ROUTER:
            return torch.float32
        if row.kind is ParameterKind.EMBEDDING:
            return self.dtype
        return functools.reduce(torch.promote_types, (self.files.tensors[name].dtype for name in row.names))


def find_tensor_sources(options: ImportOptions) -> TensorSources:
    """Read configurations and the headers of weight files, and check that they fit each other and the options.

    Raises:
        UserError: something does not fit.
    """
    model = open_hf_directory(options.hf)
    if options.expand_blocks is not None:
        _check_stays_dense(options, model)
        options = dataclasses.replace(options, num_experts=1)
    adapter = open_adapter(options.adapter) if options.adapter else None
    experts, top_k = _experts(options, model, adapter)
    _check_top_1(options, model, experts, top_k)
    for count in sorted(set(experts) - {1}):
        check_expert_parallel(count - 1, options.expert_model_parallel_size)
    inserted, inserts = _inserted_blocks(options, model, experts), options.expand_blocks is not None
    if inserts:
        experts = [1] * (len(experts) + len(inserted))
    extension = _extension(options.tokenizer, model) if options.tokenizer else None
    new_tokens = [*model.new_tokens, *([extension.new_tokens] if extension else [])]
    rows = _rows(model, adapter, experts, inserted, inserts, new_tokens)
    files = SafetensorsSource(weight_files(model.path) + ([adapter.weights] if adapter else []))
    read = [row for row in rows if not (extension and row.kind is ParameterKind.NEW_ROWS)]
    files = check_tensors(read, model.extra(), files, adapter.path if adapter else model.path, model.stored_form)
    _refuse_genuine_mixture(options, model)
    # What holds trained rows too says nothing about the dense model's dtype.
    originals = [row for row in rows if row.kind.is_original and not (row.rows and model.new_tokens)]
    dtype = common_dtype([files.tensors[name] for row in originals for name in row.names], model.path)
    check_trained_dtypes((name for row in rows for name in row.names), files)
    return TensorSources(
        model,
        adapter,
        experts,
        top_k,
        options.seed,
        rows,
        files,
        dtype,
        inserted,
        inserts,
        _languages(options, model, adapter),
        new_tokens,
        extension,
    )


def _extension(tokenizer: Path, model: HFDirectory) -> TokenizerExtension:
    rows = model.architecture.vocab_size + sum(model.new_tokens)
    return open_extension(tokenizer, model.path, rows, str(model.path))


def _refuse_genuine_mixture(options: ImportOptions, model: HFDirectory) -> None:
    """Refuse a stock MoE of which nothing says that it was upcycled: in one that was trained as a mixture (Qwen3-MoE,
    Mixtral) expert 0 is no original, and stage 1 would overwrite all the others."""
    if model.is_moe and not model.card and not (options.original_languages and options.expanded_languages):
        raise UserError(
            f"{model.path}: a mixture without this project's moe_lpr/card.json, and one that was trained as a mixture "
            "has no original expert to keep; give its dense base model, or, only if another program upcycled it with "
            "the dense FFN as expert 0, the languages of both with --original-languages and --expanded-languages"
        )


def _rows(
    model: HFDirectory,
    adapter: Adapter | None,
    experts: list[int],
    inserted: list[int],
    inserts: bool,
    new_tokens: list[int],
) -> list[Row]:
    architecture = dataclasses.replace(model.architecture, num_layers=len(experts))
    expansions = model.card.expansions if model.is_moe and model.card else ()
    layout = ADAPTER_LAYOUT if adapter else model.layout
    rows = model_rows(architecture, experts, layout, expansions, new_tokens)
    return mark_inserted(rows, len(experts), inserted, new=inserts) if inserted else rows


def _check_top_1(options: ImportOptions, model: HFDirectory, experts: list[int], top_k: int) -> None:
    if max(experts) > 1 and top_k == 1 and not options.allow_top_1 and not model.is_moe:
        raise UserError(
            "--top-k 1: a single expert is weighted by its probability, which is below 1, so the upcycled model would "
            "not compute what the dense model does; use --top-k 2, or --allow-top-1 if you want this"
        )


def _languages(options: ImportOptions, model: HFDirectory, adapter: Adapter | None) -> ImportedLanguages | None:
    has_experts, history = model.is_moe or adapter is not None, model.card.history if model.card else []
    place = str(adapter.path if adapter else model.path)
    return read_imported_languages(options.original_languages, options.expanded_languages, has_experts, history, place)


def _inserted_blocks(options: ImportOptions, model: HFDirectory, experts: list[int]) -> list[int]:
    """Blocks that the import inserts, or that the source, an export of a model with inserted blocks, has already."""
    present = model.card.inserted_blocks if model.card else []
    if present and model.card and len(model.card.experts_per_layer) != len(experts):
        raise UserError(f"{model.path}: moe_lpr/card.json is another model's; remove it to read the model as it is")
    if present and max(experts) > 1:
        raise UserError(
            f"{model.path}: has inserted blocks, and a model that has them stays dense: give --num-experts 1; to "
            "upcycle it with all its blocks as original ones, remove moe_lpr/card.json from it"
        )
    if options.expand_blocks is None:
        return present
    if present:
        raise UserError(f"{FLAG}: {model.path} has inserted blocks already; leave the flag out")
    return inserted_positions(model.architecture.num_layers, options.expand_blocks)


def _check_stays_dense(options: ImportOptions, model: HFDirectory) -> None:
    others = {
        "--num-experts": options.num_experts not in (None, 1),
        "--moe-layer-freq": options.moe_layer_freq is not None,
        EXPERTS_FLAG: options.experts_per_layer is not None,
        "--top-k": options.top_k is not None,
        "--adapter": options.adapter is not None,
    }
    for name, given in others.items():
        if given:
            raise UserError(f"{FLAG} and {name}: a model with inserted blocks stays dense; give one of them")
    if model.is_moe:
        raise UserError(f"{FLAG}: {model.path} has experts; blocks are inserted into dense models")
    if model.architecture.family.norms == "after":
        raise UserError(
            f"{FLAG}: {model.architecture.family.architecture} normalises what a block adds, so that an inserted block "
            "would add a vector of full size after one step; use experts"
        )


def _experts(options: ImportOptions, model: HFDirectory, adapter: Adapter | None) -> tuple[list[int], int]:
    """Experts of each layer and top-k: those that the source has, or what the options make of a dense one."""
    num_layers = model.architecture.num_layers
    if model.is_moe and adapter:
        raise UserError(f"--adapter: {model.path} has experts already; give the adapter's dense base model by --hf")
    if model.is_moe:
        return given_experts(options, model.experts_per_layer, model.top_k, str(model.path))
    if adapter:
        return given_experts(options, adapter.experts_per_layer(num_layers), adapter.top_k, str(adapter.path))
    return upcycled_experts(options, num_layers)
