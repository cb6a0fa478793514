"""Recognise tokenizer formats that this package does not read, and say how transformers converts them."""

from pathlib import Path

SAVE = "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"


def other_tokenizer(directory: Path) -> str:
    """Return a hint for a directory without a readable tokenizer; empty if its format is unknown.

    Args:
        directory: the path given by the user; may be a file.
    """
    if not directory.is_dir():
        return ""
    names = {file.name for file in directory.iterdir()}
    if "tekken.json" in names:
        return (
            "; tekken.json is Mistral's own form: take tokenizer.json from the model's repository, or write it with "
            "transformers 5: TokenizersBackend(tokenizer_object=MistralConverter('tekken.json').converted())"
            ".save_pretrained(DIR), the class from transformers.integrations.mistral"
        )
    if any(name.endswith(".tiktoken") for name in names):
        return (
            "; a .tiktoken file is read by code that comes with the model alone: take tokenizer.json of a model with "
            "the same tokenizer (of Qwen 1's, that of Qwen 1.5), or convert it with transformers' TikTokenConverter"
        )
    if {"vocab.json", "merges.txt"} <= names:
        return f"; vocab.json and merges.txt become one with transformers: {SAVE} writes it, with the same ids"
    if "vocab.json" in names or "vocab.txt" in names:
        return f"; transformers writes it from what is there: {SAVE}"
    if "config.json" in names:
        return "; the model is here and its tokenizer is not: copy the tokenizer's files from where it comes from"
    return ""


def other_model_file(path: Path) -> str:
    """Return a hint for a `tokenizer.model` that is not a SentencePiece model; empty if its format is unknown."""
    with open(path, "rb") as stream:
        first = stream.readline(200).split()
    # tiktoken format: each line holds a base64 token and its rank.
    if len(first) == 2 and first[1].isdigit():
        return (
            "; it is tiktoken's form, as in Meta's own files of Llama 3: take tokenizer.json from the model's Hugging "
            "Face form"
        )
    return ""
