"""The training stages as data: which parameters train, with which losses, on which languages."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megatron_moe_lpr.data.language_names import covered
from megatron_moe_lpr.data.reading.config import DataSources
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.flag_marks import Acceptable, Decides, Free
from megatron_moe_lpr.flag_ranges import NonNegativeFloat, PositiveInt
from megatron_moe_lpr.model.configuration.parameter_kinds import ParameterKind, kind_of
from megatron_moe_lpr.program import command

if TYPE_CHECKING:
    import torch

StageName = Literal["1", "2", "sft", "full", "blocks"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training stage."""

    name: StageName
    title: str
    trains: frozenset[ParameterKind]
    load_balancing_coeff: float
    """Default of --load-balancing-coeff."""
    lpr_loss_coeff: float
    """Default of --lpr-loss-coeff."""
    new_token_loss_coeff: float
    """Default of --new-token-loss-coeff."""
    original_languages: Literal["refused", "required", "allowed"]
    """Whether the stage accepts training data of original languages."""
    needs_experts: bool
    needs_inserted_blocks: bool = False
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Flags of training that have another default in this stage, by name."""

    @property
    def coefficients(self) -> dict[str, Any]:
        """Coefficients of the losses, by their name, which is that of the flag and of the field of MoELPRConfig."""
        return {name: value for name, value in vars(self).items() if name.endswith("_coeff")}


STAGES: dict[StageName, Stage] = {
    "1": Stage(
        "1",
        "post-pretraining",
        frozenset({ParameterKind.ROUTER, ParameterKind.NEW_EXPERTS, ParameterKind.NEW_ROWS}),
        load_balancing_coeff=0.01,
        lpr_loss_coeff=0.0,
        new_token_loss_coeff=0.0,
        original_languages="refused",
        needs_experts=True,
    ),
    "2": Stage(
        "2",
        "review",
        frozenset({ParameterKind.ROUTER, ParameterKind.NEW_ROWS}),
        load_balancing_coeff=0.0,
        lpr_loss_coeff=0.1,
        new_token_loss_coeff=3.0,
        original_languages="required",
        needs_experts=True,
    ),
    # Routing is as the review has left it: load balancing would pull against it. OLMoE (arXiv 2409.02060, section 4.3)
    # leaves it out of its fine-tuning too; learning rate and decay are OLMoE's.
    "sft": Stage(
        "sft",
        "fine-tuning on conversations",
        frozenset({ParameterKind.ROUTER, ParameterKind.NEW_EXPERTS, ParameterKind.NEW_ROWS}),
        load_balancing_coeff=0.0,
        lpr_loss_coeff=0.1,
        new_token_loss_coeff=3.0,
        original_languages="allowed",
        needs_experts=True,
        flags={"lr": "2e-5", "lr_decay_style": "linear"},
    ),
    "full": Stage(
        "full",
        "continued pre-training of every parameter",
        frozenset(ParameterKind),
        load_balancing_coeff=0.01,
        lpr_loss_coeff=0.0,
        new_token_loss_coeff=0.0,
        original_languages="allowed",
        needs_experts=False,
    ),
    "blocks": Stage(
        "blocks",
        "training of inserted blocks (LLaMA-Pro)",
        frozenset({ParameterKind.INSERTED_BLOCKS, ParameterKind.NEW_ROWS}),
        load_balancing_coeff=0.0,
        lpr_loss_coeff=0.0,
        new_token_loss_coeff=0.0,
        original_languages="allowed",
        needs_experts=False,
        needs_inserted_blocks=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class StageOptions:
    """Stage and losses. Coefficients are in the paper's units."""

    stage: Decides[StageName]
    """What trains. 1: new experts, routers, new vocabulary rows; 2: routers, new vocabulary rows; sft: as 1, on
    conversations; full: everything; blocks: inserted blocks (LLaMA-Pro), new vocabulary rows."""
    load_balancing_coeff: Acceptable[NonNegativeFloat | None] = None
    """Weight of the load balancing loss, mean over layers of N * sum f_i P_i. Default: 0.01 in stages 1 and full, else
    0."""
    lpr_loss_coeff: Acceptable[NonNegativeFloat | None] = None
    """Weight of the LPR loss. Default: 0.1 in stages 2 and sft, else 0."""
    new_token_loss_coeff: Acceptable[NonNegativeFloat | None] = None
    """Weight of -log(1 - probability of all new tokens), mean over tokens of original languages.
    Default: 3 in sft, and in a review that trains rows of new tokens; else 0."""
    lpr_loss_form: Acceptable[Literal["paper", "reference"]] = "paper"
    """reference: an earlier implementation's form, for comparison only (docs/training.md)."""
    train_embeddings: Decides[bool] = False
    """Stages 1 and sft: train input and output embeddings too, the dense model's rows of them."""
    train_new_rows: Decides[bool] = True
    """Stage 2: train the rows of new tokens too, where the model has any (`import --tokenizer`). Other stages always
    do."""
    train_base_router: Decides[bool] = False
    """Stages 1, 2 and sft of a mixture (`import --add-experts`): train the routers' rows of its own experts too."""
    allow_original_languages: Annotated[bool, Free("only checked against the data, which are recorded")] = False
    """Stage 1: accept training data of original languages."""
    open_experts_iters: Decides[PositiveInt | None] = None
    """After an expansion (`expand`): steps over which the latest experts come in. Default: a tenth of --train-iters."""

    def resolve(self) -> Stage:
        """Return the stage with the values of this run's flags in place of its defaults.

        Raises:
            UserError: a flag that the stage does not offer.
        """
        stage = STAGES[self.stage]
        if self.stage == "2" and not self.train_new_rows:
            stage = dataclasses.replace(stage, trains=stage.trains - {ParameterKind.NEW_ROWS}, new_token_loss_coeff=0.0)
        if self.train_embeddings and self.stage not in ("1", "sft"):
            raise UserError("--train-embeddings is for --stage 1 and sft only")
        if self.train_base_router and self.stage not in ("1", "2", "sft"):
            raise UserError("--train-base-router is for --stage 1, 2 and sft only")
        if self.allow_original_languages:
            stage = dataclasses.replace(stage, original_languages="allowed")
        given = {ParameterKind.EMBEDDING} if self.train_embeddings else set()
        given |= {ParameterKind.BASE_ROUTER} if self.train_base_router else set()
        coefficients = stage.coefficients
        coefficients |= {name: _given(getattr(self, name), default) for name, default in coefficients.items()}
        return dataclasses.replace(
            stage,
            trains=stage.trains | given,
            **coefficients,
        )


def check_stage(
    stage: Stage,
    is_moe: bool,
    sources: DataSources,
    earlier: Sequence[Sequence[str]] = (),
    has_inserted_blocks: bool = False,
) -> None:
    """Check that the stage can train this checkpoint on this training data.

    Args:
        is_moe: whether the checkpoint has experts.
        earlier: languages of each expansion before the latest one.
        has_inserted_blocks: whether the checkpoint has blocks that block expansion inserted.

    Raises:
        UserError: naming the flag and what is wrong.
    """
    check_stage_model(stage, is_moe, has_inserted_blocks)
    _check_languages(stage, sources, earlier)


def check_stage_model(stage: Stage, is_moe: bool, has_inserted_blocks: bool, flag: str = "--load") -> None:
    """Check that the stage can train this model, whatever the data are.

    Args:
        is_moe: whether the model has experts.
        has_inserted_blocks: whether it has blocks that block expansion inserted.
        flag: names the model in messages.

    Raises:
        UserError: it lacks what the stage trains.
    """
    if stage.needs_experts and not is_moe:
        raise UserError(
            f"{flag}: --stage {stage.name} needs experts and the checkpoint is dense; "
            f"upcycle it with {command('import')} --num-experts"
        )
    if stage.needs_inserted_blocks and not has_inserted_blocks:
        raise UserError(
            f"{flag}: --stage {stage.name} trains inserted blocks and the checkpoint has none; "
            f"insert them with {command('import')} --expand-blocks"
        )


def stage_note(stage: Stage, sources: DataSources) -> str | None:
    """Return a note about training data that the stage accepts and is not meant for, or None."""
    if stage.name != "sft" or any(entry.manifest.chat for entry in sources.train):
        return None
    return (
        f"--data-path: no conversations for stage sft, so every token counts in the loss; {command('preprocess')} "
        "--chat writes them"
    )


def _check_languages(stage: Stage, sources: DataSources, earlier: Sequence[Sequence[str]]) -> None:
    original = sources.trained_original
    if stage.original_languages == "refused" and original:
        raise UserError(
            f"--data-path: stage {stage.name} trains on expanded languages only, and {', '.join(sorted(original))} "
            "is original; leave it out, or pass --allow-original-languages"
        )
    if stage.original_languages == "required" and not original:
        raise UserError(
            f"--original-languages: stage {stage.name} replays original languages, and --data-path has none of "
            f"{', '.join(sources.original_languages) or 'them'}; name them and add their data"
        )
    for group in earlier:
        trained = covered({entry.language for entry in sources.train}, group)
        if stage.original_languages == "refused" and trained:
            raise UserError(
                f"--data-path: stage {stage.name} trains on the languages of the latest expansion only, and "
                f"{', '.join(sorted(trained))} belongs to an earlier one; leave it out, or pass "
                "--allow-original-languages"
            )
        if stage.original_languages == "required" and not trained:
            raise UserError(
                f"--data-path: stage {stage.name} replays the languages of earlier expansions, and none of "
                f"{', '.join(group)} is there; add their data"
            )
        original |= trained
    expanded = {entry.language for entry in sources.train} - original
    if stage.original_languages == "required" and not expanded:
        raise UserError(f"--data-path: stage {stage.name} wants text of expanded languages beside the replay")


def freeze(
    chunks: "Iterable[torch.nn.Module]", stage: Stage, inserted_blocks: Collection[int] = (), extensions: int = 1
) -> None:
    """Set requires_grad on the parameters that the stage trains, and on no others.

    Args:
        inserted_blocks: layers of the whole model, from 0, that block expansion inserted.
        extensions: number of vocabulary extensions of the model; only rows of the latest one are new.
    """
    for chunk in chunks:
        inserted = _numbers_in_chunk(chunk, inserted_blocks)
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(kind_of(name, inserted, extensions) in stage.trains)


def _numbers_in_chunk(chunk: "torch.nn.Module", layers: Collection[int]) -> set[int]:
    """Map layers of the whole model to their numbers in the parameter names of a chunk, which count from 0 in it."""
    found = {}
    for name, module in chunk.named_modules():
        if match := re.search(r"\bdecoder\.layers\.(\d+)$", name):
            found[int(match[1])] = module.layer_number - 1  # Megatron counts from 1.
    return {number for number, layer in found.items() if layer in layers}


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
