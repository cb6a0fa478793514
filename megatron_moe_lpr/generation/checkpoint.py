"""Text from a Megatron checkpoint at any layout, with a cache of keys and values."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_moe_lpr.checkpoint.format.chain import resolve_and_hold
from megatron_moe_lpr.checkpoint.loading.model import LoadedModel, load_model, model_shape
from megatron_moe_lpr.checkpoint.loading.verification import open_checkpoint
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.generation.continuing import Continuation, ContinuedText, OnToken, TextModel
from megatron_moe_lpr.generation.options import ModelOptions, SamplingOptions
from megatron_moe_lpr.generation.sampling import choose_token
from megatron_moe_lpr.generation.tokens import PromptTokenizer
from megatron_moe_lpr.liveness import advance, long_work
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import check_layout
from megatron_moe_lpr.model.configuration.dtype import choose_dtype, report_dtype
from megatron_moe_lpr.model.decoding import CachedForward
from megatron_moe_lpr.parallel.every_rank import on_rank_0
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.platform import select_platform


@contextlib.contextmanager
def open_checkpoint_model(options: ModelOptions) -> Iterator["CheckpointModel"]:
    """Open `options.load` and join the ranks; every rank must call it. The weights are not loaded yet.

    Raises:
        UserError: there is no checkpoint, or the layout does not fit it.
    """
    assert options.load is not None
    with resolve_and_hold(options.load, options.base_checkpoint) as iteration:
        yield CheckpointModel(options, iteration)


class CheckpointModel(TextModel):
    """A checkpoint's model, computed by PyTorch's layers on the CPU and on GPUs.

    Data-parallel ranks all compute the same texts. Sequence parallelism is off: a step reads one token of each text.
    """

    def __init__(self, options: ModelOptions, iteration: Path) -> None:
        self._options = options
        self._directory = open_checkpoint(iteration, options.verify, options.base_checkpoint)
        self._shape, self._card = model_shape(self._directory), self._directory.card()
        self.max_length = self._shape.architecture.max_position_embeddings
        check_layout(self._shape, options.layout)
        size = options.layout.tensor_model_parallel_size
        self._platform = select_platform(options.platform, size, "local")
        initialize_parallel(self._platform, options.layout, timeout_minutes=options.distributed_timeout_minutes)
        self.tokenizer: PromptTokenizer | None = None
        self._model: LoadedModel | None = None
        on_rank_0(self._load_tokenizer)

    def _load_tokenizer(self) -> None:
        given = self._options.tokenizer
        if given is None and not self._card.tokenizer_files:
            raise UserError(f"{self._directory.path}: the checkpoint has no tokenizer; give --tokenizer DIRECTORY")
        place = self._directory.side_directory if given is None else given
        self.tokenizer = PromptTokenizer(place, self._options.chat_template)

    def load(self) -> None:
        card, options = self._card, self._options
        dtype = choose_dtype(options.dtype, card.compute_dtype, self._platform)
        report_dtype(options.dtype, card.compute_dtype, card.dtype, self._platform)
        with long_work(f"loading {self._directory.path}"):
            self._model = load_model(
                self._directory,
                options.layout,
                self._platform,
                ComputeOptions().with_dtype(dtype),
                verified=options.verify,
                sequence_parallel=False,
            )

    def generate(
        self, prompts: Sequence[list[int]], options: SamplingOptions, ends: frozenset[int], on_token: OnToken
    ) -> list[Continuation]:
        numbers = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        found: dict[int, Continuation] = {}
        for first in range(0, len(numbers), options.inference_max_requests):
            chosen = numbers[first : first + options.inference_max_requests]
            batch = _Batch({number: prompts[number] for number in chosen}, options, ends, self.max_length)
            self._continue(batch, on_token)
            found |= batch.results()
        return [found[number] for number in range(len(prompts))]

    def _continue(self, batch: "_Batch", on_token: OnToken) -> None:
        """Add tokens to all texts of a batch.

        As Megatron's static engine does, the pass over the prompts ends with the shortest one, and a longer prompt's
        own tokens are read in place of chosen ones: no text needs padding.
        """
        assert self._model is not None
        device, size = self._platform.device, self._shape.total_vocab_size
        forward = CachedForward(self._model.chunks, self._model.config, size, len(batch.texts), batch.longest)
        read = 0
        while not batch.finished:
            end = min(len(text) for text in batch.texts if not text.finished)
            tokens = torch.tensor([text.at(read, end) for text in batch.texts], device=device)
            logits = forward.advance(tokens)
            read = end
            batch.extend(_choose_together(logits, batch, read, on_token))
            advance()


def _choose_together(logits: torch.Tensor, batch: "_Batch", read: int, on_token: OnToken) -> dict[int, int]:
    """Choose on rank 0 the next token of each text that has been read to its end, and send it to all ranks.

    One rank chooses: the ranks' logits may differ in the last bits, and all must go on with the same token.
    """
    chosen = torch.full((len(batch.texts) + 1,), -1, dtype=torch.int64)
    error: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            for row, token in batch.choose(logits.float().cpu(), read).items():
                chosen[row] = token
                batch.show(row, token, on_token)
            chosen[-1] = 0
        except BaseException as caught:  # also Ctrl-C and a closed pipe: the other ranks wait for the tokens
            error = caught
    shared = chosen.to(logits.device)
    dist.broadcast(shared, 0)
    if error is not None:
        raise error
    *tokens, went_on = shared.tolist()
    if went_on < 0:
        raise SystemExit(0)  # rank 0 says why, and its exit code is that of all
    return {row: token for row, token in enumerate(tokens) if token >= 0}


class _Batch:
    """Texts that are continued together."""

    def __init__(
        self, prompts: dict[int, list[int]], options: SamplingOptions, ends: frozenset[int], max_length: int
    ) -> None:
        self._options, self._ends = options, ends
        self._numbers = list(prompts)
        most = options.num_tokens_to_generate
        limits = [min(most, max_length - len(prompt)) for prompt in prompts.values()]
        self.texts = [
            ContinuedText(prompt, limit, ends) for prompt, limit in zip(prompts.values(), limits, strict=True)
        ]
        self.longest = max(len(text) + limit for text, limit in zip(self.texts, limits, strict=True))
        # A generator for each text: what is drawn does not depend on the other prompts of its batch.
        self._generators = [torch.Generator().manual_seed(options.seed + number) for number in prompts]

    @property
    def finished(self) -> bool:
        """Whether all texts are finished."""
        return all(text.finished for text in self.texts)

    def choose(self, logits: torch.Tensor, read: int) -> dict[int, int]:
        """Choose the next token of each text that has been read to its end.

        Args:
            logits: fp32 [batch, token ids].
            read: positions that have been read.
        """
        return {
            row: choose_token(logits[row], self._options, self._generators[row])
            for row, text in enumerate(self.texts)
            if len(text) == read and not text.finished
        }

    def show(self, row: int, token: int, on_token: OnToken) -> None:
        """Pass a token on, unless it ends the text."""
        if token not in self._ends:
            on_token(self._numbers[row], token)

    def extend(self, chosen: dict[int, int]) -> None:
        """Add the chosen tokens."""
        for row, token in chosen.items():
            self.texts[row].add(token)

    def results(self) -> dict[int, Continuation]:
        """Return what was added, by the number of the prompt."""
        return {number: text.result() for number, text in zip(self._numbers, self.texts, strict=True)}
