"""Load an export in the transformers that runs this; its choices at every place of given texts, as JSON.

load_in_transformers.py DIRECTORY TEXTS.json    [[token ids of a text], ...]; prints [[choices, log-probabilities], ...]
"""

import json
import sys

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "In 2024, 12345 don't  \n\n  x  über\t42 % 你好123"


@torch.no_grad()
def choices(directory: str, texts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """The likeliest token after each token of each text but its last, and its log-probability."""
    ids = Tokenizer.from_file(f"{directory}/tokenizer.json").encode(TEXT).ids
    assert AutoTokenizer.from_pretrained(directory)(TEXT).input_ids == ids, "the tokenizer splits text otherwise"
    model, information = AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(information.values()), information
    results = []
    for text in texts:
        best = model.eval()(torch.tensor([text])).logits[0, :-1].float().log_softmax(-1).max(-1)
        results.append((best.indices.tolist(), best.values.tolist()))
    return results


if __name__ == "__main__":
    with open(sys.argv[2]) as stream:
        print(json.dumps(choices(sys.argv[1], json.load(stream))))
