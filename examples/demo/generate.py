"""Generate a sentence in each language with an exported model, in transformers, without this project's model code."""

import dataclasses
from pathlib import Path

import torch
from corpus import texts
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.conversion.hugging_face.quiet import quiet_transformers
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.json_files import write_json


@dataclasses.dataclass
class Flags:
    """Generate a sentence in each language with an exported model."""

    hf: Path
    """Hugging Face directory."""
    corpus: Path
    """Directory with LANGUAGE.jsonl.zst; the beginning of its first document is the prompt."""
    languages: list[str]
    """Languages to generate in."""
    output: Path
    """JSON file to write: a list of language, prompt, text."""
    prompt_characters: int = 60
    """Characters of the prompt, up to the end of a word."""
    new_tokens: int = 40
    """Tokens to generate."""


def main() -> None:
    """Command line."""
    flags = parse_flags(Flags, description=__doc__)
    # Not AutoTokenizer: for a model_type of qwen2, transformers 5 splits text by Qwen2's rules, not by the file's.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(flags.hf)
    model = load(flags.hf)
    samples = []
    for language in flags.languages:
        prompt = first_words(flags.corpus / f"{language}.jsonl.zst", flags.prompt_characters)
        text = continue_text(model, tokenizer, prompt, flags.new_tokens)
        samples.append({"language": language, "prompt": prompt, "text": text})
        print(f"{language}: {prompt} [...] {text}")
    write_json(samples, flags.output)


def load(directory: Path) -> PreTrainedModel:
    """Load a model by transformers' stock class, and check that no tensor is missing or left over."""
    with quiet_transformers():
        model, information = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    problems = {kind: names for kind, names in information.items() if names}
    if problems:
        raise UserError(f"--hf {directory}: weights do not fit {type(model).__name__}: {problems}")
    print(f"{directory}: {type(model).__name__}, every weight in its place")
    return model.eval()


def first_words(path: Path, characters: int) -> str:
    """Return the beginning of a file's first long document, cut after a word."""
    text = next(text for text in texts([str(path)]) if len(text) > 4 * characters)
    start = text.index("\n") + 1 if "\n" in text[: 2 * characters] else 0  # behind the heading
    words = text[start : start + characters].replace("\n", " ")
    return words.rsplit(" ", 1)[0] if " " in words else words


@torch.no_grad()
def continue_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """Return the greedy continuation of a prompt, with a penalty against the repetitions of small models."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.2,
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    run_command(main)
