"""The JSON files that a report is made from, as pydantic models, and how they are read."""

import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from megatron_moe_lpr.data.language_names import canonical_language
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS

T = TypeVar("T")


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Routing(_Model):
    """Routing of a dataset's tokens."""

    expert0_top_k_share: list[float | None]
    """Fraction of the tokens with expert 0 in the top k, from 0 to 1, of each layer; of a mixture base the share of its
    experts in the tokens' top k. None for a dense layer."""


class Dataset(_Model):
    """Results on one dataset; None: not measured."""

    language: Annotated[str, AfterValidator(canonical_language)]
    name: str = ""
    group: str
    tokens: NonNegativeInt
    is_packed: bool = False
    """Whether samples held whole documents (best-fit packing)."""
    documents_apart: bool = False
    """Whether no document saw another."""
    loss: float | None = None
    """Mean negative log-likelihood of a token, in nats."""
    bits_per_byte: float | None
    routing: Routing | None

    def is_text_of(self, other: "Dataset") -> bool:
        """Whether both were measured on the same text, in samples of the same kind: as many tokens or, of two
        tokenizers, as many bytes."""
        if (self.language, self.group) != (other.language, other.group):
            return False
        # Packing predicts no document's first token; apart, documents have less context.
        if (self.is_packed, self.documents_apart) != (other.is_packed, other.documents_apart):
            return False
        if self.text_bytes is None or other.text_bytes is None:
            return self.tokens == other.tokens
        return math.isclose(self.text_bytes, other.text_bytes, rel_tol=1e-6)

    @property
    def text_bytes(self) -> float | None:
        """Bytes of the text, from the two means over it; None: it was not measured."""
        return self.loss * self.tokens / math.log(2) / self.bits_per_byte if self.loss and self.bits_per_byte else None


class Averages(_Model):
    """Means over the datasets of a language group."""

    bits_per_byte: float | None
    expert0_top_k_share: float | None = None
    new_token_mass: float | None = None


class EvaluationRecord(_Model):
    """A file of `moe-lpr evaluate --output`, as far as the report reads it."""

    sequence_length: PositiveInt
    reset_attention_mask: bool = False
    """Whether no document saw another."""
    top_k: PositiveInt
    experts_per_layer: Annotated[list[PositiveInt], Field(min_length=1)]
    base_experts: list[PositiveInt] = []
    """Original experts of each layer, where the base model is a mixture more than 1."""
    averages: dict[str, Averages]
    """By language group."""
    datasets: list[Dataset]

    @property
    def has_mixture_base(self) -> bool:
        """Whether the base model is a mixture, all of whose experts are original ones."""
        return max(self.base_experts, default=1) > 1

    @model_validator(mode="after")
    def _check_fields_against_each_other(self) -> "EvaluationRecord":
        if missing := set(LANGUAGE_GROUPS) - self.averages.keys():
            raise ValueError(f"averages has no {missing.pop()!r}")
        for index, one in enumerate(self.datasets):
            if one.group not in LANGUAGE_GROUPS:
                raise ValueError(f"datasets.{index}.group is neither {' nor '.join(LANGUAGE_GROUPS)}")
            if one.routing and len(one.routing.expert0_top_k_share) != len(self.experts_per_layer):
                raise ValueError(f"datasets.{index}.routing and experts_per_layer differ in the number of layers")
        return self


class Costs(_Model):
    """What a model costs."""

    parameters: PositiveFloat
    active_parameters: PositiveFloat
    generated_tokens_per_second: PositiveFloat


class CurvePoint(_Model):
    """A value of a setting, and the files of the evaluations with it."""

    value: str
    evaluations: Annotated[list[Path], Field(min_length=1)]


class CurveFile(_Model):
    """A curve over the values of one setting."""

    title: str
    caption: str
    setting: str
    points: Annotated[list[CurvePoint], Field(min_length=1)]


class Sample(_Model):
    """Text that a model has generated after a prompt."""

    language: str
    prompt: str
    text: str


def read_record(path: Path, kind: type[T], place: str, expected: str) -> T:
    """Read a JSON file of the type `kind`.

    Args:
        place: flag and file, for messages.
        expected: what the file should be, for messages.

    Raises:
        UserError: the file cannot be read, or a field is missing or of another type; it names the first such field.
    """
    data = read_bytes(path, place)
    try:
        return TypeAdapter(kind).validate_json(data)
    except ValidationError as error:
        problem: Any = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, problem["loc"]))[:200]
        reason = f"{field}: {problem['msg']}" if field else problem["msg"]
        raise UserError(f"{place}: {expected} is expected: {reason}") from None


def read_bytes(path: Path, place: str) -> bytes:
    """Read a file. Raises UserError, with the flag and file `place`, where that fails."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{place}: no such file") from None
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror}") from None
