"""The dense model's weights keep its own bits, whatever the arithmetic: in every checkpoint and in the export."""

import dataclasses
import functools
import json
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.conversion.hugging_face.model_card import ORIGINAL
from megatron_moe_lpr.conversion.verification.frozen import fingerprint_of_checkpoint
from tests.conversion.helpers import checkpoint_tensors, hf_tensors, run
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, rewind, train

TP2 = {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}
EP2 = {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}
PP2 = {"pipeline_model_parallel_size": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A dense model's dtypes, what its runs compute in, and what their checkpoints and exports then hold."""

    matrices: torch.dtype
    norms: torch.dtype
    precision: dict[str, bool]
    trained: torch.dtype
    exported: str
    """What config.json says: the least dtype that holds all of it."""


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CASES = {
    "float16, default": Case(HALF, HALF, {"fp32": False}, BRAIN, "float32"),
    "float16, fp32": Case(HALF, HALF, {"fp32": True}, SINGLE, "float32"),
    "float32, bf16": Case(SINGLE, SINGLE, {"fp32": False, "bf16": True}, BRAIN, "float32"),
    "bfloat16 with float32 norms, default": Case(BRAIN, SINGLE, {"fp32": False}, BRAIN, "bfloat16"),
}


def run_pool(*arguments, **changes):
    return rank_pool(2).run(functools.partial(train, *arguments, **changes))


def stored_as(case: Case) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(case.norms if tensor.dim() == 1 else case.matrices)

    return change


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def chain(request, tmp_path_factory):
    """The case and its directories: stage 1, resumed from its middle at another layout, stage 2, its export."""
    case, root = request.param, tmp_path_factory.mktemp("chain")
    checkpoint, data = make_checkpoint(root, change=stored_as(case)), make_data(root)
    run_pool(checkpoint, root / "1", data, save_interval=3, **TP2, **case.precision)
    rewind(root / "1", root / "resumed", 3)
    run_pool(checkpoint, root / "resumed", data, save_interval=2, **EP2, **case.precision)
    run_pool(root / "resumed", root / "2", data, "2", async_save=False, **PP2, **case.precision)
    run("export", "--load", root / "2", "--hf", root / "out")
    return case, root


def dense_names(name: str) -> str:
    """What the dense model calls a tensor of a Qwen2-MoE."""
    return name.replace(".mlp.experts.0.", ".mlp.")


def assert_own_bits(exported, base) -> None:
    """Byte for byte, against the dense model's files as the safetensors library reads them."""
    originals = {dense_names(name): tensor for name, tensor in exported.items() if dense_names(name) in base}
    assert originals.keys() == base.keys()
    for name, tensor in base.items():
        assert originals[name].dtype == tensor.dtype, name
        assert torch.equal(originals[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("part", ["1/iter_0000003", "1", "resumed/iter_0000004", "resumed", "2"])
def test_every_checkpoint_has_the_dense_models_bits(part, chain):
    case, root = chain
    card = resolve_checkpoint(root / part).card()
    assert card.dtype == str(case.matrices).removeprefix("torch.")
    assert card.original_fingerprint == resolve_checkpoint(root / "checkpoint").card().original_fingerprint
    assert fingerprint_of_checkpoint(root / part) == card.original_fingerprint
    dtypes = {
        kind: {
            tensor.dtype
            for key, tensor in checkpoint_tensors(root / part).items()
            if key.startswith("decoder.") and kind in key
        }
        for kind in (".original_expert.", "self_attention.linear_proj", "layernorm", ".experts.experts.", ".router.")
    }
    assert list(dtypes.values()) == [{case.matrices}, {case.matrices}, {case.norms}, {case.trained}, {SINGLE}]


def test_a_review_keeps_the_bits_of_new_experts(chain):
    """They are frozen in stage 2."""
    first, second = (checkpoint_tensors(chain[1] / part) for part in ("resumed", "2"))
    keys = [key for key in second if key.startswith("decoder.") and ".mlp.experts." in key]
    assert len(keys) == 4 * 4 * 3 and all(torch.equal(first[key], second[key]) for key in keys)


def test_the_export_has_them_and_says_so(chain):
    case, root = chain
    assert_own_bits(hf_tensors(root / "out"), hf_tensors(root / "hf"))
    config = json.loads((root / "out" / "config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {case.exported}
    assert ORIGINAL in (root / "out" / "README.md").read_text()


def test_stock_loaders_lose_nothing(chain):
    """transformers with dtype="auto" has every value of the files, but for routers and norms, whose values it casts to
    the dtype of the matrices, as it does in the dense model."""
    case, root = chain
    model = AutoModelForCausalLM.from_pretrained(root / "out", dtype="auto", local_files_only=True)
    assert model.dtype == getattr(torch, case.exported)
    model.save_pretrained(root / "saved")
    saved = hf_tensors(root / "saved")
    for name, tensor in hf_tensors(root / "out").items():
        assert torch.equal(saved[name].float(), tensor.to(saved[name].dtype).float()), name
        if tensor.dim() > 1 and not name.endswith("mlp.gate.weight"):
            assert torch.equal(saved[name].double(), tensor.double()), name


def test_an_export_comes_back_with_every_bit(chain, tmp_path):
    _, root = chain
    run("import", "--hf", root / "out", "--save", tmp_path / "back")
    found, expected = checkpoint_tensors(tmp_path / "back"), checkpoint_tensors(root / "2")
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key][: len(tensor)]), key
    card = resolve_checkpoint(tmp_path / "back").card()
    assert card.original_fingerprint == fingerprint_of_checkpoint(root / "2")
    assert card.dtype == resolve_checkpoint(root / "2").card().dtype
