"""What a model writes: its greedy answers to ten English questions, and a continuation in each new language."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from generate import continue_text, first_words
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_moe_lpr.data.tokenizer_settings import eos_ids

QUESTIONS = (
    "What is the capital of France?",
    "How many days does a week have?",
    "Why is the sky blue?",
    "Give me three names for a cat.",
    "What is the opposite of cold?",
    "Write one sentence about the sea.",
    "What do bees make?",
    "Which planet is the largest in the solar system?",
    "How do I boil an egg?",
    "Who wrote Romeo and Juliet?",
)
ANSWER_TOKENS = 40
CONTINUATION_TOKENS = 40
PROMPT_CHARACTERS = 60


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, questions: Sequence[str] = QUESTIONS
) -> list[str]:
    """Return the greedy answer to each question, cut after `ANSWER_TOKENS` tokens.

    Through the model's own chat template, or, where it has none, as a line `Answer:` to be continued.
    """
    prompts = [question_ids(tokenizer, question) for question in questions]
    longest = max(map(len, prompts))
    ids, attended = (torch.zeros(len(prompts), longest, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attended[row, longest - len(prompt) :] = 1
    declared = eos_ids(directory)
    ends = sorted(declared[0]) if declared else [tokenizer.eos_token_id]
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=attended,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in output[:, longest:]]


def question_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Return the tokens of a question, up to where the answer begins."""
    if not tokenizer.chat_template:
        return tokenizer(f"Question: {question}\nAnswer:").input_ids
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, valid: Path, languages: Sequence[str]
) -> list[dict[str, str]]:
    """Return language, prompt and greedy continuation of the first held-out text of each language."""
    found = []
    for language in languages:
        (file,) = sorted(valid.glob(f"{language}.jsonl*"))[:1]
        prompt = first_words(file, PROMPT_CHARACTERS)
        text = continue_text(model, tokenizer, prompt, CONTINUATION_TOKENS)
        found.append({"language": language, "prompt": prompt, "text": text})
    return found


def identical_answers(measured: Mapping[str, Any], reference: Mapping[str, Any]) -> int:
    """Return how many answers are the same as those of the reference, character by character."""
    return sum(one == other for one, other in zip(measured["answers"], reference["answers"], strict=True))
