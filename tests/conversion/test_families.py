"""Families that compute more than Llama, or store it otherwise: each once through everything, in few process starts.

`test_parity.py` and `test_round_trip.py` have further cases of the four first families.
"""

import shutil

import pytest
import torch

from megatron_moe_lpr.conversion.hugging_face.hf_config import DENSE_FAMILY_OF_MOE
from tests.conversion.helpers import (
    UPCYCLED_ELSEWHERE,
    assert_same_tensors,
    change_config,
    change_hf,
    checkpoint_tensors,
    hf_tensors,
    perturb,
    rewrite_checkpoint,
    run,
)
from tests.conversion.test_parity import hf_logits, megatron_logits
from tests.conversion.tiny_models import COMMON, FURTHER_MODELS, make_model, save_model
from tests.conversion.tiny_models import load_model as load_hf
from tests.distributed import rank_pool
from tests.training.one_step import StepCase, run_step
from tests.training.test_layouts import differences

STEP_0 = 2e-6
"""Largest difference of logits, over the largest logit."""
TP2, PP2, EP2 = ({f"{kind}_model_parallel_size": 2} for kind in ("tensor", "pipeline", "expert"))
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "moe", "layernorm")}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
STEPS = {
    "TP2+SP": StepCase(TP2, stage="full"),
    "PP2, recompute selective": StepCase(PP2, stage="full", recompute=SELECTIVE),
    # Of all but the experts DP2.
    "EP2": StepCase(EP2, stage="full", optimizer={"use_distributed_optimizer": True}),
    "TP2xEP2, recompute full": StepCase(TP2 | EP2, stage="full", recompute=FULL),
}


@pytest.fixture(scope="module", params=FURTHER_MODELS)
def paths(request, tmp_path_factory):
    """`hf` and, imported from it, `dense`, `moe`, and `trained` with its export `stock`; two layers."""
    root, before = tmp_path_factory.mktemp("families") / request.param, COMMON["num_hidden_layers"]
    COMMON["num_hidden_layers"] = 2
    save_model(request.param, root / "hf")
    for name, experts in (("dense", 1), ("moe", 3), ("trained", 3)):
        run("import", "--hf", root / "hf", "--save", root / name, "--num-experts", experts)
    rewrite_checkpoint(root / "trained", perturb)
    run("export", "--load", root / "trained", "--hf", root / "stock")
    yield request.param, root
    COMMON["num_hidden_layers"] = before


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() < STEP_0 * expected.abs().max()


def test_equals_transformers_and_comes_back(paths, cpu_platform):
    """Step 0, the stock class with other experts, and every tensor on the way there and back."""
    name, root = paths
    dense = hf_logits(make_model(name))
    for kind in ("dense", "moe"):
        assert_close(megatron_logits(root / kind, {}), dense)
    ours, stock = megatron_logits(root / "trained", {}), hf_logits(load_hf(root / "stock"))
    assert_close(ours, stock)
    assert torch.equal(ours.argmax(-1), stock.argmax(-1))
    assert (ours - dense).abs().max() > 0.05, "the perturbation does not show"
    run("export", "--load", root / "dense", "--hf", root / "back")
    assert_same_tensors(hf_tensors(root / "hf"), hf_tensors(root / "back"))
    assert_close(hf_logits(load_hf(root / "back")), dense)
    run("import", "--hf", root / "stock", "--save", root / "again")
    assert_same_tensors(checkpoint_tensors(root / "trained"), checkpoint_tensors(root / "again"))


def test_edited_export_comes_back(paths, capsys):
    """Its own config.json counts where it was edited; the card names the family."""
    name, root = paths
    change_config(root / "stock", max_position_embeddings=COMMON["max_position_embeddings"] // 2)
    if name == "cohere":
        change_config(root / "stock", sliding_window=COMMON["max_position_embeddings"] // 2)
    run("import", "--hf", root / "stock", "--save", root / "edited")
    assert_same_tensors(checkpoint_tensors(root / "trained"), checkpoint_tensors(root / "edited"))
    run("export", "--load", root / "edited", "--hf", root / "stock again")
    assert ("vLLM takes 32 / 4" in "".join(capsys.readouterr())) == (name == "seed_oss")
    first, second = (hf_logits(load_hf(root / part)) for part in ("stock", "stock again"))
    assert torch.equal(first, second)
    if name in DENSE_FAMILY_OF_MOE.values():
        load_hf(root / "stock").save_pretrained(root / "without card")
        run("import", "--hf", root / "without card", "--save", root / "elsewhere", *UPCYCLED_ELSEWHERE)
        assert_same_tensors(checkpoint_tensors(root / "trained"), checkpoint_tensors(root / "elsewhere"))


def test_layouts_and_gradients(paths):
    """All gradients of a step, those of the frozen parts too, are one process's; and so are the logits."""
    name, root = paths
    stock = hf_logits(load_hf(root / "stock"))
    for fields in (TP2, PP2):
        for logits in rank_pool(2).run(megatron_logits, root / "trained", fields):
            assert_close(logits, stock)
    if name in ("helium", "ernie4_5"):
        return  # the same as Llama's but for the order of rows in the file
    reference = rank_pool(1).run(run_step, root / "trained", StepCase(stage="full"))[0]
    assert any("layernorm" in key for key in reference.gradients)
    for layout, case in STEPS.items():
        for result in rank_pool(2).run(run_step, root / "trained", case):
            found = differences(result, reference)
            worst = max(found, key=found.get)
            assert found[worst] < 1e-5, f"{layout}: {worst}: {found[worst]:.2e}"


def test_dense_layers_and_instruct_models(paths, cpu_platform):
    """A layer without experts in the stock class, and a graft of an instruct model: what an import of it gives."""
    _, root = paths
    run("import", "--hf", root / "hf", "--save", root / "some", "--num-experts", 3, "--moe-layer-freq", "[0,1]")
    rewrite_checkpoint(root / "some", perturb)
    run("export", "--load", root / "some", "--hf", root / "some stock")
    assert_close(megatron_logits(root / "some", {}), hf_logits(load_hf(root / "some stock")))
    run("import", "--hf", root / "some stock", "--save", root / "some again")
    assert_same_tensors(checkpoint_tensors(root / "some"), checkpoint_tensors(root / "some again"))
    shutil.copytree(root / "hf", root / "instruct")
    change_hf(root / "instruct", lambda tensors: tensors.update({name: 1.1 * tensors[name] for name in tensors}))
    run("import", "--hf", root / "instruct", "--save", root / "wanted", "--num-experts", 3)
    models = ("--base", root / "hf", "--instruct", root / "instruct")
    run("graft", "--load", root / "moe", *models, "--save", root / "grafted")
    found, wanted = checkpoint_tensors(root / "grafted"), checkpoint_tensors(root / "wanted")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_inserted_blocks(paths, cpu_platform):
    """LLaMA-Pro's start is exact, also where layers differ in kind; norms of outputs would undo it after one step."""
    name, root = paths
    if name == "olmo2":
        with pytest.raises(SystemExit):
            run("import", "--hf", root / "hf", "--save", root / "grown", "--expand-blocks", 1)
        return
    run("import", "--hf", root / "hf", "--save", root / "grown", "--expand-blocks", 1)
    assert_close(megatron_logits(root / "grown", {}), hf_logits(make_model(name)))
    run("export", "--load", root / "grown", "--hf", root / "grown hf")
    assert_close(hf_logits(load_hf(root / "grown hf")), hf_logits(make_model(name)))
