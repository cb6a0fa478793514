"""The linear probe of the demo: what it finds in data whose answer is known."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch):
    """The script as a module; its neighbour `corpus` is found as when it is started."""
    monkeypatch.syspath_prepend(str(DEMO))
    yield importlib.import_module("separate_languages")
    sys.modules.pop("separate_languages")
    sys.modules.pop("corpus")


def test_the_direction_that_separates_is_found(probe):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 500, 8, generator=generator)
    truth = torch.tensor([3.0, -1.0, 0, 0, 2.0, 0, 0, 0])
    positive, negative = inputs[inputs @ truth > 0], inputs[inputs @ truth <= 0]
    found = probe.separate([positive[None, :300], positive[None, 300:]], [negative[None]])
    assert torch.cosine_similarity(found, truth, dim=0) > 0.99
    assert (positive @ found > 0).float().mean() > 0.99 and (negative @ found <= 0).float().mean() > 0.99


def test_inputs_are_the_normalised_residual_stream_of_each_layer(probe):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (11, 7))
    inputs = probe.ffn_inputs(model, ids)
    assert [part.shape for part in inputs] == [(11, 7, 16)] * 3
    states = model(ids, output_hidden_states=True).hidden_states
    layer = model.model.layers[0]
    rebuilt = states[1] - layer.mlp(inputs[0])
    assert torch.allclose(layer.post_attention_layernorm(rebuilt), inputs[0], atol=1e-5)
