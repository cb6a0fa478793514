"""Load exports in the transformers that runs this, and print log-probabilities as JSON.

load_in_transformers.py REQUEST.json    {directory: [token ids, ...]}; the output has the same form
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def log_probabilities(directory: str, texts: list[list[int]]) -> list[list[float]]:
    """Of each token of each text after its first."""
    assert AutoTokenizer.from_pretrained(directory).decode([72, 105]), "the tokenizer does not load"
    model, information = AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(information.values()), information
    results = []
    for text in texts:
        rows = model.eval()(torch.tensor([text])).logits[0].float().log_softmax(-1)
        results.append([float(rows[index, token]) for index, token in enumerate(text[1:])])
    return results


if __name__ == "__main__":
    with open(sys.argv[1]) as stream:
        request = json.load(stream)
    answer = {directory: log_probabilities(directory, texts) for directory, texts in request.items()}
    print(json.dumps({"version": transformers.__version__, "answer": answer}))
