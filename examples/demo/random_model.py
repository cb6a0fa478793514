"""Make the untrained base model: a tokenizer of the demo corpus and a small Qwen2 with random weights."""

import dataclasses
import json
from pathlib import Path

import torch
from corpus import texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.json_files import write_json

END_OF_DOCUMENT = "<|endoftext|>"


@dataclasses.dataclass
class Flags:
    """Make a tokenizer and a small Qwen2 with random weights."""

    input: list[str]
    """JSON lines to train the tokenizer on, in the form that preprocess reads."""
    hf: Path
    """Hugging Face directory to write."""
    vocab_size: int = 1024
    """Size of the vocabulary, the 256 bytes and the end of document included."""
    hidden_size: int = 256
    """Hidden size."""
    intermediate_size: int = 1024
    """FFN size."""
    num_layers: int = 4
    """Transformer layers."""
    seed: int = 1234
    """Seed of the weights."""


def main() -> None:
    """Command line."""
    flags = parse_flags(Flags, description=__doc__)
    if flags.hf.exists():
        raise UserError(f"--hf {flags.hf}: exists; remove it or choose another directory")
    tokenizer = train_tokenizer(flags.input, flags.vocab_size)
    model = random_model(flags)
    tokenizer.save_pretrained(flags.hf)
    _name_class_of_transformers_4(flags.hf / "tokenizer_config.json")
    model.save_pretrained(flags.hf)
    print(f"{flags.hf}: {sum(weight.numel() for weight in model.parameters()):,} parameters, {len(tokenizer):,} tokens")


def _name_class_of_transformers_4(path: Path) -> None:
    """Write a tokenizer class that transformers 4 knows too; transformers 5 writes TokenizersBackend."""
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    write_json(config, path, sort_keys=True)


def train_tokenizer(inputs: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(inputs), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT)


def random_model(flags: Flags) -> Qwen2ForCausalLM:
    """Return a Qwen2 as transformers initialises it: grouped-query attention, QKV bias, tied embeddings."""
    torch.manual_seed(flags.seed)
    config = Qwen2Config(
        vocab_size=flags.vocab_size,
        hidden_size=flags.hidden_size,
        intermediate_size=flags.intermediate_size,
        num_hidden_layers=flags.num_layers,
        num_attention_heads=flags.hidden_size // 64,
        num_key_value_heads=flags.hidden_size // 128,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


if __name__ == "__main__":
    run_command(main)
