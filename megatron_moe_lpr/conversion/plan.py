"""What an import will do: which experts each layer gets and where every tensor comes from, checked before any work."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_moe_lpr.checkpoint.format.card import MAX_EXPERTS, check_experts
from megatron_moe_lpr.conversion.experts_per_layer import FLAG as EXPERTS_FLAG
from megatron_moe_lpr.conversion.experts_per_layer import read_experts_per_layer
from megatron_moe_lpr.conversion.hugging_face.adapter import Adapter, open_adapter
from megatron_moe_lpr.conversion.hugging_face.hf_directory import (
    HFDirectory,
    check_tensors,
    check_trained_dtypes,
    common_dtype,
    open_hf_directory,
)
from megatron_moe_lpr.conversion.hugging_face.safetensors_source import SafetensorsSource, weight_files
from megatron_moe_lpr.conversion.imported_languages import ImportedLanguages, read_imported_languages
from megatron_moe_lpr.conversion.layer_frequency import layers_with_experts
from megatron_moe_lpr.conversion.tensors.blocks import FLAG, inserted_positions, mark_inserted
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.tensors import ADAPTER_LAYOUT, Role, Row, model_rows
from megatron_moe_lpr.parallel.experts import check_expert_parallel

PAPER_NUM_EXPERTS = 6
PAPER_TOP_K = 2


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """What the user asked for; None: not given."""

    hf: Path
    num_experts: int | None = None
    top_k: int | None = None
    moe_layer_freq: str | None = None
    experts_per_layer: str | None = None
    """Numbers by layer, or the JSON file of tools/allocate_experts.py."""
    expand_blocks: int | None = None
    """Blocks to insert; the model stays dense."""
    seed: int = 1234
    adapter: Path | None = None
    allow_top_1: bool = False
    expert_parallel_size: int = 1
    """Only checked."""
    original_languages: Sequence[str] = ()
    """Of experts that the source brings: languages of its dense model."""
    expanded_languages: Sequence[str] = ()
    """Languages that these experts were trained on."""


@dataclasses.dataclass(frozen=True)
class ImportPlan:
    """A checked import."""

    model: HFDirectory
    adapter: Adapter | None
    experts_per_layer: list[int]
    top_k: int
    seed: int
    rows: list[Row]
    source: SafetensorsSource
    dtype: torch.dtype
    """Of the dense model's matrices."""
    inserted_blocks: list[int]
    """Layers, in the numbers of the checkpoint."""
    inserts: bool
    """They are inserted by this import; else the source has them."""
    languages: ImportedLanguages | None
    """Of experts that were trained elsewhere, where the user says them."""

    @property
    def initialises_routers(self) -> bool:
        """Routers get initial values: the source has none."""
        return any(row.role is Role.ROUTER and not row.names for row in self.rows)

    def dtype_of(self, row: Row) -> torch.dtype:
        """The dtype that a tensor is stored in: the source's own; routers are float32.

        Query, key and value become one tensor: where their biases differ in dtype, in one that holds them all exactly.
        """
        if row.role is Role.ROUTER:
            return torch.float32
        return functools.reduce(torch.promote_types, (self.source.tensors[name].dtype for name in row.names))


def plan_import(options: ImportOptions) -> ImportPlan:
    """Read configurations and headers and check that they fit what was asked for.

    Raises:
        UserError: anything that does not fit.
    """
    model = open_hf_directory(options.hf)
    if options.expand_blocks is not None:
        _check_stays_dense(options, model)
        options = dataclasses.replace(options, num_experts=1)
    adapter = open_adapter(options.adapter) if options.adapter else None
    experts, top_k = _experts(options, model, adapter)
    check_experts(experts, "--num-experts")
    _check_routing(experts, top_k, options.allow_top_1 or model.is_moe)
    for count in sorted(set(experts) - {1}):
        check_expert_parallel(count - 1, options.expert_parallel_size)
    layout = ADAPTER_LAYOUT if adapter else model.layout
    inserted = _inserted_blocks(options, model, experts)
    inserts, architecture = options.expand_blocks is not None, model.architecture
    if inserts:
        experts = [1] * (len(experts) + len(inserted))
        architecture = dataclasses.replace(architecture, num_layers=len(experts))
    rows = model_rows(architecture, experts, layout, model.card.expansions if model.is_moe and model.card else ())
    if inserted:
        rows = mark_inserted(rows, len(experts), inserted, new=inserts)
    files = weight_files(model.path) + ([adapter.weights] if adapter else [])
    source = SafetensorsSource(files)
    check_tensors(rows, model.extra(), source, adapter.path if adapter else model.path)
    originals = [source.tensors[name] for row in rows if row.role.is_original for name in row.names]
    dtype = common_dtype(originals, model.path)
    check_trained_dtypes((name for row in rows for name in row.names), source)
    languages = _languages(options, model, adapter)
    return ImportPlan(model, adapter, experts, top_k, options.seed, rows, source, dtype, inserted, inserts, languages)


def _languages(options: ImportOptions, model: HFDirectory, adapter: Adapter | None) -> ImportedLanguages | None:
    has_experts, history = model.is_moe or adapter is not None, model.card.history if model.card else []
    place = str(adapter.path if adapter else model.path)
    return read_imported_languages(options.original_languages, options.expanded_languages, has_experts, history, place)


def _inserted_blocks(options: ImportOptions, model: HFDirectory, experts: list[int]) -> list[int]:
    """Those that the import inserts, or that an exported grown model has and keeps."""
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


def _experts(options: ImportOptions, model: HFDirectory, adapter: Adapter | None) -> tuple[list[int], int]:
    num_layers = model.architecture.num_layers
    if model.is_moe:
        if adapter:
            raise UserError(f"--adapter: {model.path} has experts already; give the adapter's dense base model by --hf")
        return _given(options, model.experts_per_layer, model.top_k, str(model.path))
    if adapter:
        return _given(options, adapter.experts_per_layer(num_layers), adapter.top_k, str(adapter.path))
    experts = experts_of_layers(options, num_layers)
    default_top_k = PAPER_TOP_K if max(experts) > 1 else 1
    return experts, default_top_k if options.top_k is None else options.top_k


def experts_of_layers(options: ImportOptions, num_layers: int) -> list[int]:
    """Experts of each layer of a dense model that is upcycled, the original one included; 1: it stays dense.

    Raises:
        UserError: the flags contradict each other or do not fit the model.
    """
    if options.experts_per_layer is not None:
        for flag, value in (("--num-experts", options.num_experts), ("--moe-layer-freq", options.moe_layer_freq)):
            if value is not None:
                raise UserError(f"{flag} and {EXPERTS_FLAG}: give one of them")
        return read_experts_per_layer(options.experts_per_layer, num_layers)
    num_experts = PAPER_NUM_EXPERTS if options.num_experts is None else options.num_experts
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise UserError(f"--num-experts {num_experts}: from 1 (the dense model itself) to {MAX_EXPERTS:,}")
    chosen = layers_with_experts(options.moe_layer_freq or "1", num_layers)
    return [num_experts if has_experts else 1 for has_experts in chosen]


def _given(options: ImportOptions, experts: list[int], top_k: int, place: str) -> tuple[list[int], int]:
    """The source decides; what the user says beside it must agree."""
    if options.num_experts not in (None, max(experts)):
        raise UserError(f"--num-experts {options.num_experts}: {place} has {max(experts)} experts; leave the flag out")
    if options.top_k not in (None, top_k):
        raise UserError(f"--top-k {options.top_k}: {place} was trained with top-k {top_k}; leave the flag out")
    if options.moe_layer_freq is not None:
        raise UserError(f"--moe-layer-freq: {place} says which layers have experts; leave the flag out")
    if (
        options.experts_per_layer is not None
        and read_experts_per_layer(options.experts_per_layer, len(experts)) != experts
    ):
        raise UserError(f"{EXPERTS_FLAG}: {place} has other numbers of experts; leave the flag out")
    return experts, top_k


def _check_routing(experts: list[int], top_k: int, allow_top_1: bool) -> None:
    num_experts = min({count for count in experts if count > 1}, default=1)
    if top_k < 1 or top_k > num_experts:
        raise UserError(f"--top-k {top_k}: must lie between 1 and the number of experts, {num_experts}")
    if num_experts > 1 and top_k == 1 and not allow_top_1:
        raise UserError(
            "--top-k 1: a single expert is weighted by its probability, which is below 1, so the upcycled model would "
            "not compute what the dense model does; use --top-k 2, or --allow-top-1 if you want this"
        )
