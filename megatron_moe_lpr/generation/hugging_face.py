"""Text from a Hugging Face directory by transformers' own `generate`."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_moe_lpr.conversion.hugging_face.hub import model_directory
from megatron_moe_lpr.conversion.hugging_face.quiet import quiet_transformers
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json
from megatron_moe_lpr.generation.continuing import Continuation, OnToken, TextModel
from megatron_moe_lpr.generation.options import ModelOptions, SamplingOptions
from megatron_moe_lpr.generation.tokens import PromptTokenizer
from megatron_moe_lpr.liveness import advance, long_work
from megatron_moe_lpr.model.configuration.dtype import check_dtype_device
from megatron_moe_lpr.platform import select_platform


@contextlib.contextmanager
def open_hugging_face_model(options: ModelOptions) -> Iterator["HuggingFaceModel"]:
    """Open `options.hf`; the weights are not loaded yet. Raises UserError: it is no model."""
    yield HuggingFaceModel(options)


class HuggingFaceModel(TextModel):
    """A model of transformers' stock class in this process; no code of the directory is run."""

    def __init__(self, options: ModelOptions) -> None:
        assert options.hf is not None
        self._path, self._dtype = model_directory(options.hf), options.dtype
        file = self._path / "config.json"
        if not file.is_file():
            raise UserError(f"--hf {self._path}: no config.json there; give a Hugging Face directory")
        self._config = read_json(file)
        positions = self._config.get("max_position_embeddings")
        self.max_length = positions if isinstance(positions, int) else 2**31 - 1
        self._platform = select_platform(options.platform, 1, "local")
        place = self._path if options.tokenizer is None else options.tokenizer
        self.tokenizer: PromptTokenizer | None = PromptTokenizer(place, options.chat_template, settled=True)
        self._model: Any = None

    def load(self) -> None:
        from transformers import AutoModelForCausalLM

        if self._dtype is not None:
            check_dtype_device(self._dtype, self._platform)
        with long_work(f"loading {self._path}"), quiet_transformers():
            try:
                self._model = AutoModelForCausalLM.from_pretrained(
                    self._path,
                    dtype=self._own_dtype() if self._dtype is None else self._dtype,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
            except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"--hf {self._path}: transformers cannot load it: {reason}") from None
        self._model.to(self._platform.device).eval()

    def _own_dtype(self) -> "torch.dtype | str":
        """The model's own dtype, or fp32 in place of bf16 or fp16 where the processor has no instructions for bf16."""
        return "auto" if self._platform.multiplies_bf16 else torch.float32

    def generate(
        self, prompts: Sequence[list[int]], options: SamplingOptions, ends: frozenset[int], on_token: OnToken
    ) -> list[Continuation]:
        return [self._continue(number, prompt, options, ends, on_token) for number, prompt in enumerate(prompts)]

    @torch.no_grad()
    def _continue(
        self, number: int, prompt: list[int], options: SamplingOptions, ends: frozenset[int], on_token: OnToken
    ) -> Continuation:
        torch.manual_seed(options.seed + number)
        most = min(options.num_tokens_to_generate, self.max_length - len(prompt))
        self._model.generation_config = _settings(options, most, ends)
        tokens = torch.tensor([prompt], device=self._platform.device)
        with quiet_transformers():
            output = self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                streamer=_Streamer(number, ends, on_token),
            )
        added = output[0, len(prompt) :].tolist()
        ended = bool(added) and added[-1] in ends
        return Continuation(added[:-1] if ended else added, ended)


def _settings(options: SamplingOptions, most: int, ends: frozenset[int]) -> Any:
    """The settings of `generate`, which replace the model's own: penalties and temperatures of a generation_config.json
    would make its greedy text another one than that of the checkpoint."""
    from transformers import GenerationConfig

    draws: dict[str, Any] = {"do_sample": False}
    if not options.greedy:
        draws = {
            "do_sample": True,
            "temperature": 1.0 if options.temperature is None else options.temperature,
            "top_k": options.top_k or 0,
            "top_p": options.top_p or 1.0,
        }
    end_ids = sorted(ends)
    ending = {"eos_token_id": end_ids, "pad_token_id": end_ids[0]} if end_ids else {}
    return GenerationConfig(max_new_tokens=most, **ending, **draws)


class _Streamer:
    """What transformers calls with the prompt first, then with each token."""

    def __init__(self, number: int, ends: frozenset[int], on_token: OnToken) -> None:
        self._number, self._ends, self._on_token = number, ends, on_token
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Pass a token on."""
        if not self._is_prompt:
            for token in value.reshape(-1).tolist():
                if token not in self._ends:
                    self._on_token(self._number, token)
                advance()
        self._is_prompt = False

    def end(self) -> None:
        """Called after the last token."""
