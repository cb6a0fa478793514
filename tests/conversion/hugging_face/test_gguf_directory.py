"""GGUF files: the directory made of one against transformers' own reading of the same file, and against the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, quants

from megatron_moe_lpr.conversion.hugging_face.gguf_directory import dequantised_directory
from megatron_moe_lpr.conversion.hugging_face.gguf_weights import MODULES, OUTSIDE
from megatron_moe_lpr.errors import UserError
from tests.conversion.helpers import run
from tests.conversion.tiny_models import LLAMA3_ROPE, load_model, make_model

BASE = Path(__file__).parents[3] / "data" / "base_model"
NAMES = {theirs: ours for ours, theirs in MODULES.items()} | {theirs: ours for ours, theirs in OUTSIDE.items()}


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, *module, kind = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(module)]}.{kind}"


def pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of rows in which llama.cpp stores queries and keys of `llama`."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path: Path, name: str, kind: str = "F32", divisors: np.ndarray | None = None, **fields: object) -> Path:
    """Write a tiny model as llama.cpp's converter does, with the demo's tokenizer."""
    model = make_model(name)
    config, family = model.config, model.config.model_type
    writer = GGUFWriter(path, family)
    writer.add_license("apache-2.0")
    sizes = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "context_length": config.max_position_embeddings,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": model.model.layers[0].self_attn.head_dim,
    }
    numbers = {
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in (sizes | numbers | fields).items():
        if value is not None:  # None: the file lacks the field.
            add[type(value)](f"{family}.{key}", value)
    add_tokenizer(writer, config.vocab_size)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if family == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = pairs_together(
                tensor, config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            )
        # Blocks have 32 values: a file has several types.
        fits = kind == "F32" or tensor.shape[-1] % 32 == 0
        quantised = GGMLQuantizationType[(kind if fits else "F16") if tensor.dim() > 1 else "F32"]
        writer.add_tensor(gguf_name(key), quants.quantize(tensor.numpy(), quantised), raw_dtype=quantised)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def add_tokenizer(writer: GGUFWriter, size: int) -> None:
    """Its first tokens, which are bytes, and one merge of two of them: `size` tokens."""
    vocabulary = json.loads((BASE / "tokenizer.json").read_text())["model"]["vocab"]
    pair = ("A", "b")
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__)[: size - 3], "Ġ", "Ċ", "".join(pair)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair)])
    writer.add_eos_token_id(1)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@torch.no_grad()
def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(60).view(2, 30)).logits.float()


@pytest.mark.parametrize("name", ["qwen2", "qwen3-tied", "llama", "mistral-full"])
def test_float32_file_is_the_model(name, tmp_path, home):
    name_of_file = "llama" if name == "mistral-full" else name
    path = write_gguf(tmp_path / "tiny.gguf", name_of_file)
    directory = dequantised_directory(path)
    assert directory.parent == home / "moe-lpr" / "gguf"
    torch.testing.assert_close(logits(load_model(directory)), logits(make_model(name_of_file)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["qwen2-tied", "llama3-tied"])
def test_quantised_file_as_transformers_reads_it(name, tmp_path, home):
    """Blocks of 32 values in Q8_0: bfloat16 rounds them once more."""
    path = write_gguf(tmp_path / "tiny.gguf", name.replace("llama3-tied", "llama"), "Q8_0")
    ours = load_model(dequantised_directory(path)).state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        wanted = tensor.to(torch.bfloat16) if tensor.dim() > 1 else tensor
        assert torch.equal(ours[key], wanted.float()), key


def test_llama3_divisors(tmp_path, home):
    """transformers computes the divisors; the file keeps nothing else."""
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters=LLAMA3_ROPE | {"original_max_position_embeddings": 8192, "factor": 32.0},
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    divisors = 500000.0 ** -(torch.arange(0, 32, 2).double() / 32) / frequencies.double()
    assert divisors.max() == pytest.approx(32)
    from megatron_moe_lpr.conversion.hugging_face.gguf_metadata import _llama3_rope

    found = _llama3_rope(tmp_path, divisors.numpy(), 500000.0, 32)
    assert found == {
        "rope_type": "llama3",
        "factor": pytest.approx(32.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    with pytest.raises(UserError, match=r"rope_freqs.weight is not that of Llama 3.1"):
        _llama3_rope(tmp_path, divisors.numpy()[::-1], 500000.0, 32)


def test_import_and_model_card(tmp_path, home, capsys):
    path = write_gguf(tmp_path / "tiny-Q8_0.gguf", "qwen2-tied", "Q8_0")
    run("import", "--hf", path, "--save", tmp_path / "checkpoint", "--num-experts", 2)
    run("verify", "--load", tmp_path / "checkpoint", "--hf", path, "--tolerance", "1e-5")
    run("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "imported from `tiny-Q8_0.gguf`, whose weights were quantised (Q8_0)" in card, card
    assert len(list((home / "moe-lpr" / "gguf").iterdir())) == 1


def test_tokenizer_of_the_file(tmp_path, home):
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2")
    directory = dequantised_directory(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    own = json.loads((directory / "tokenizer.json").read_text())
    assert own["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"].count(r"\p{N}|") == 1
    text = "A1 b\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert json.loads((directory / "generation_config.json").read_text()) == {"eos_token_id": 1}


REFUSED = {
    "another architecture": ({"name": "qwen2"}, {"general.architecture": "gemma3"}, "architecture gemma3"),
    "yarn": ({"name": "qwen2", "rope.scaling.type": "yarn"}, {}, "positions scaled by yarn"),
    "part of the head rotates": ({"name": "qwen2", "rope.dimension_count": 4}, {}, "rope.dimension_count is 4"),
    "a window": ({"name": "llama", "attention.sliding_window": 8}, {}, "attention.sliding_window is 8"),
    "scaled without a type": ({"name": "qwen2", "rope.scaling.factor": 4.0}, {}, "rope.scaling.factor is 4.0"),
    "scaled, as old files say it": ({"name": "llama", "rope.scale_linear": 4.0}, {}, "rope.scale_linear is 4.0"),
    "no epsilon": (
        {"name": "llama", "attention.layer_norm_rms_epsilon": None},
        {},
        "llama.attention.layer_norm_rms_epsilon is None",
    ),
    "groups by layer": ({"name": "llama", "attention.head_count_kv": [2] * 4}, {}, "head_count_kv is .2, 2, 2, 2."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path, home):
    arguments, replaced, message = REFUSED[case]
    path = write_gguf(tmp_path / "tiny.gguf", **arguments)
    for old, new in replaced.items():
        content = path.read_bytes()
        start = content.index(old.encode()) + len(old) + 4
        length = int.from_bytes(content[start : start + 8], "little")
        value = len(new).to_bytes(8, "little") + new.encode()
        path.write_bytes(content[:start] + value + content[start + 8 + length :])
    with pytest.raises(UserError, match=message) as caught:
        dequantised_directory(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not list((home / "moe-lpr" / "gguf").glob("*")) if (home / "moe-lpr" / "gguf").exists() else True


@pytest.mark.parametrize("kept", [0, 3, 40, 2000, 0.99])
def test_truncated(kept, tmp_path, home):
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"not a whole GGUF file .* copy it again"):
        dequantised_directory(path)
