"""Where an import reads each tensor of the new checkpoint from, checked before anything is written."""

import dataclasses
import functools
from pathlib import Path

import torch

from megatron_moe_lpr.conversion.added_experts import (
    AddedExperts,
    added_counts,
    chosen_experts,
    copied_rows,
)
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
from megatron_moe_lpr.conversion.import_options import ADD_FLAG, ImportOptions, given_experts, upcycled_experts
from megatron_moe_lpr.conversion.imported_languages import ImportedLanguages, read_imported_languages
from megatron_moe_lpr.conversion.tensors.blocks import FLAG, inserted_positions, mark_inserted
from megatron_moe_lpr.data.tokenizer_extension import TokenizerExtension
from megatron_moe_lpr.data.vocabulary_extension import open_extension
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.families import MIXTURES
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind
from megatron_moe_lpr.model.tensors import ADAPTER_LAYOUT, Row, model_rows
from megatron_moe_lpr.parallel.experts import check_expert_parallel, check_mixture_parallel


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
    added: AddedExperts | None = None
    """New experts that this import adds to a mixture; None: it adds none."""

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
        if row.kind.is_router:
            return torch.float32
        if row.kind is ParameterKind.EMBEDDING:
            return self.dtype
        return functools.reduce(torch.promote_types, (self.files.tensors[name].dtype for name in row.names))


def find_tensor_sources(options: ImportOptions) -> TensorSources:
    """Read configurations and the headers of weight files, and check that they fit each other and the options.

    Raises:
        UserError: something does not fit.
    """
    given_languages = bool(options.original_languages and options.expanded_languages)
    model = open_hf_directory(options.hf, upcycled_elsewhere=given_languages and options.add_experts is None)
    if options.expand_blocks is not None:
        _check_stays_dense(options, model)
        options = dataclasses.replace(options, num_experts=1)
    adapter = open_adapter(options.adapter) if options.adapter else None
    added = added_experts(options, model)
    experts, top_k = _experts(options, model, adapter)
    if added:
        experts = [base + count for base, count in zip(experts, added.counts, strict=True)]
    _check_top_1(options, model, experts, top_k)
    _check_expert_parallel(options.expert_model_parallel_size, model, experts)
    inserted, inserts = _inserted_blocks(options, model, experts), options.expand_blocks is not None
    if inserts:
        experts = [1] * (len(experts) + len(inserted))
    extension = _extension(options.tokenizer, model) if options.tokenizer else None
    new_tokens = [*model.new_tokens, *([extension.new_tokens] if extension else [])]
    rows = _rows(model, adapter, experts, inserted, inserts, new_tokens)
    if added and model.architecture.mixture:
        rows = copied_rows(rows, added, model.architecture.mixture, model.layout)
    files = SafetensorsSource(weight_files(model.path) + ([adapter.weights] if adapter else []))
    read = [row for row in rows if not (extension and row.kind is ParameterKind.NEW_ROWS)]
    files = check_tensors(read, model.extra(), files, adapter.path if adapter else model.path, model.stored_form)
    _refuse_untouched_mixture(options, model)
    # What holds trained rows too says nothing about the dense model's dtype.
    originals = [row for row in rows if row.kind.is_original and not (row.rows and model.new_tokens)]
    originals = [row for row in originals if not row.kind.is_router]
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
        added,
    )


def _extension(tokenizer: Path, model: HFDirectory) -> TokenizerExtension:
    rows = model.architecture.vocab_size + sum(model.new_tokens)
    return open_extension(tokenizer, model.path, rows, str(model.path))


def added_experts(options: ImportOptions, model: HFDirectory) -> AddedExperts | None:
    """New experts of a mixture; None: the import adds none.

    Raises:
        UserError: the option for another source, or one that does not fit.
    """
    mixture, added = model.architecture.mixture, options.add_experts
    if mixture is None or model.card:
        if added is not None:
            more = f"is none of those ({', '.join(MIXTURES)})" if model.is_moe else "is dense"
            if model.card:
                more = "has new experts already; import it without the flag, then use `expand`"
            raise UserError(f"{ADD_FLAG}: is for a base model that is a mixture, and {model.path} {more}")
        return None
    if added is None:
        return None
    for flag, value in (("--adapter", options.adapter), ("--expanded-languages", options.expanded_languages)):
        if value:
            raise UserError(f"{flag} and {ADD_FLAG}: give one of them; training records the languages of new experts")
    counts = added_counts(added, mixture.experts)
    return AddedExperts(chosen_experts(options.new_experts_from, counts, mixture.experts, options.seed))


def _refuse_untouched_mixture(options: ImportOptions, model: HFDirectory) -> None:
    """Refuse a mixture that nothing is added to: none of its experts may train, since all are original ones."""
    given_languages = options.original_languages and options.expanded_languages
    if model.is_moe and not model.card and options.add_experts is None and not given_languages:
        adds = f"{ADD_FLAG} N keeps all of them frozen and adds new ones"
        if model.architecture.mixture is None:
            adds = f"new ones beside them are for {', '.join(MIXTURES)} alone ({ADD_FLAG})"
        raise UserError(
            f"{model.path}: a mixture, none of whose experts this project has added; {adds}. Only if another program "
            "upcycled it, with the dense FFN as expert 0, give the languages of both with --original-languages and "
            "--expanded-languages"
        )


def _check_expert_parallel(size: int, model: HFDirectory, experts: list[int]) -> None:
    for layer, count in enumerate(experts):
        base = model.architecture.base_experts(layer)
        if base > 1:
            check_mixture_parallel(base, [count - base], size)
        elif count > 1:
            check_expert_parallel(count - 1, size)


def _rows(
    model: HFDirectory,
    adapter: Adapter | None,
    experts: list[int],
    inserted: list[int],
    inserts: bool,
    new_tokens: list[int],
) -> list[Row]:
    architecture = dataclasses.replace(model.architecture, num_layers=len(experts))
    expansions = model.card.expansions if model.is_moe and model.card else []
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
