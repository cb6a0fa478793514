"""The router's losses, gradients and statistics against float64 formulas written here."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, switch_load_balancing_loss_func

from megatron_moe_lpr.model.moe.router import LPRRouter
from megatron_moe_lpr.model.moe.routing_statistics import gather_routing
from megatron_moe_lpr.model.moe.token_tags import token_tags
from tests.model.sizes import small_config, small_shape

SEQUENCE, BATCH, HIDDEN, EXPERTS, TOP_K = 6, 3, 32, 4, 2


@pytest.fixture
def make_router(cpu_platform):
    def make(**overrides) -> LPRRouter:
        config = small_config(cpu_platform, small_shape(EXPERTS, TOP_K), **overrides)
        router = LPRRouter(config, ProcessGroupCollection.use_mpu_process_groups())
        torch.manual_seed(5)
        torch.nn.init.normal_(router.weight, std=0.3)
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
        return router

    return make


@pytest.fixture
def hidden():
    return torch.randn(SEQUENCE, BATCH, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(2)
    original = torch.rand(BATCH, SEQUENCE, generator=generator) < 0.5
    valid = torch.rand(BATCH, SEQUENCE, generator=generator) < 0.8
    return original, valid


def reference_logits(router, hidden, dtype=torch.float64):
    """[sequence * batch, experts] with the weight as a leaf that takes gradients."""
    weight = router.weight.detach().to(dtype).requires_grad_(True)
    return hidden.to(dtype).reshape(-1, HIDDEN) @ weight.T, weight


def sequence_first(mask):
    return mask.T.reshape(-1)


def gradient_of_attached_losses(router, hidden, tags):
    """Gradient of the router's weight from the losses alone: the weights' own gradient is zero."""
    router.weight.grad = None
    weights, *_ = router(hidden, tags.transpose(0, 1))
    (weights * 0.0).sum().backward()
    return router.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_fp32_whatever_transformer_engine_would_do(dtype, make_router, hidden, monkeypatch):
    """Megatron's own calls Transformer Engine's product where installed, which in 2.9 mixes fp32 and bf16 operands."""

    def refuse(*arguments, **options):
        raise AssertionError("Transformer Engine's product was called")

    monkeypatch.setattr(moe_utils, "te_general_gemm", refuse, raising=False)
    router, rounded = make_router(), hidden.to(dtype)
    given = rounded.clone().requires_grad_()
    exact_input = rounded.double().requires_grad_()
    exact_weight = router.weight.detach().double().requires_grad_()
    gradient = torch.randn(SEQUENCE, BATCH, EXPERTS, generator=torch.Generator().manual_seed(3))
    (logits, _), expected = router.gating(given), exact_input @ exact_weight.T
    assert (logits.dtype, router.weight.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
    logits.backward(gradient)
    expected.backward(gradient.double())
    assert given.grad.dtype == dtype
    torch.testing.assert_close(router.weight.grad.double(), exact_weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given.grad.double(), exact_input.grad, rtol=torch.finfo(dtype).eps * 8, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_experts_is_added_before_rounding(dtype, make_router, hidden):
    router, given = make_router(), hidden.clone().to(dtype).requires_grad_()
    logits, states = router.gating(given)
    gradients = torch.randn(logits.shape), torch.randn(states.shape).to(dtype)
    torch.autograd.backward((logits, states), gradients)
    exact = gradients[0].double() @ router.weight.detach().double() + gradients[1].double()
    assert given.grad.dtype == dtype
    torch.testing.assert_close(given.grad.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert not router.gating(hidden)[1].requires_grad


def test_routing_is_softmax_top_k_renormalised(make_router, hidden):
    router = make_router()
    weights, choices, _ = router(hidden)
    logits, _ = reference_logits(router, hidden)
    best = torch.softmax(logits, -1).topk(TOP_K, dim=-1)
    expected = torch.zeros_like(logits).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(choices, expected > 0)


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_lpr_gradient(make_router, hidden, masks, form):
    router = make_router(lpr_loss_coeff=0.1, lpr_loss_form=form, num_moe_layers=5)
    original, valid = masks
    tags = token_tags(original, valid, lpr_weight=1.0 / (original & valid).sum())
    logits, weight = reference_logits(router, hidden)
    scores = torch.softmax(logits, -1)
    chance = scores[:, 0] if form == "paper" else scores[:, 0].exp() / scores.exp().sum(-1)
    loss = -chance.log()[sequence_first(original & valid)].mean()
    (0.1 / 5 * loss).backward()
    gradient = gradient_of_attached_losses(router, hidden, tags)
    torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-5, atol=1e-8)
    measured = gather_routing([(0, router.statistics)], 1, EXPERTS).lpr_loss[0, 0]
    torch.testing.assert_close(measured, loss.detach(), rtol=1e-6, atol=0)


def test_reference_form_has_a_floor_above_zero():
    from megatron_moe_lpr.model.moe.losses import lpr_negative_log_likelihood

    certain = torch.tensor([[50.0, 0.0, 0.0, 0.0]])
    floor = torch.log(torch.tensor(1 + 3 / torch.e))
    assert lpr_negative_log_likelihood(certain, "reference").item() == pytest.approx(floor.item(), rel=1e-6)
    assert lpr_negative_log_likelihood(certain, "paper").item() == pytest.approx(0.0, abs=1e-6)


def test_load_balancing_gradient(make_router, hidden, masks):
    router = make_router(load_balancing_coeff=0.01, num_moe_layers=3)
    original, valid = masks
    logits, weight = reference_logits(router, hidden)
    kept = sequence_first(valid)
    scores = torch.softmax(logits, -1)[kept]
    counts = torch.zeros_like(scores).scatter(1, scores.topk(TOP_K, dim=-1).indices, 1.0).sum(0)
    tokens = kept.sum()
    loss = EXPERTS * (counts / tokens * scores.mean(0)).sum()
    (0.01 / 3 * loss).backward()
    gradient = gradient_of_attached_losses(router, hidden, token_tags(original, valid))
    torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-5, atol=1e-9)
    measured = gather_routing([(0, router.statistics)], 1, EXPERTS).load_balancing[0]
    torch.testing.assert_close(measured, loss.detach(), rtol=1e-6, atol=0)


def test_both_losses_with_the_scale_of_the_main_loss(make_router, hidden, masks):
    """The gradients add up, multiplied by the scale; beside them the weights have their own."""
    router = make_router(load_balancing_coeff=0.02, lpr_loss_coeff=0.1, num_moe_layers=3)
    MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 7.0))
    original, valid = masks
    logits, weight = reference_logits(router, hidden)
    scores, chosen = torch.softmax(logits, -1), logits.topk(TOP_K, dim=-1)
    load = torch.zeros_like(logits).scatter(1, chosen.indices, 1.0)[sequence_first(valid)].mean(0)
    balance = 0.02 / 3 * EXPERTS * (load * scores[sequence_first(valid)].mean(0)).sum()
    prior = 0.1 / 3 * -scores[:, 0].log()[sequence_first(original & valid)].sum()
    weights = torch.zeros_like(logits).scatter(1, chosen.indices, torch.softmax(chosen.values, -1))
    factors = torch.randn(weights.shape, generator=torch.Generator().manual_seed(4))
    (7 * (balance * 5 + prior) + (weights * factors).sum()).backward()
    tags = token_tags(original, valid, micro_batch_weight=5.0)
    (router(hidden, tags.transpose(0, 1))[0] * factors).sum().backward()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-6)


def test_papers_coefficient_in_megatrons_unit(make_router, hidden, masks):
    """The paper's c is Megatron's c * k / layers: Megatron divides by k and sums over layers."""
    coefficient, layers = 0.01, 3
    router = make_router(load_balancing_coeff=coefficient, num_moe_layers=layers)
    original, _ = masks
    everything = torch.ones_like(original)
    logits, weight = reference_logits(router, hidden, torch.float32)
    scores = torch.softmax(logits, -1)
    counts = torch.zeros_like(scores).scatter(1, scores.topk(TOP_K, dim=-1).indices, 1.0).sum(0)
    megatron = switch_load_balancing_loss_func(
        probs=scores,
        tokens_per_expert=counts,
        total_num_tokens=SEQUENCE * BATCH,
        topk=TOP_K,
        num_experts=EXPERTS,
        moe_aux_loss_coeff=coefficient * TOP_K / layers,
    )
    megatron.backward()
    gradient = gradient_of_attached_losses(router, hidden, token_tags(original, everything))
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-5, atol=1e-9)


def test_uniform_load_is_k(make_router):
    from megatron_moe_lpr.model.moe.losses import load_balancing_loss

    uniform, load = torch.full((EXPERTS,), 1 / EXPERTS), torch.full((EXPERTS,), TOP_K / EXPERTS)
    assert load_balancing_loss(uniform, load).item() == pytest.approx(TOP_K)


def test_no_original_token_and_padding_alone_give_zero(make_router, hidden, masks):
    router = make_router(load_balancing_coeff=0.01, lpr_loss_coeff=0.1)
    original, _ = masks
    nothing = torch.zeros_like(original)
    assert gradient_of_attached_losses(router, hidden, token_tags(original, nothing)).abs().max() == 0
    router = make_router(lpr_loss_coeff=0.1)
    assert gradient_of_attached_losses(router, hidden, token_tags(nothing, ~nothing)).abs().max() == 0


def test_losses_of_parts_add_up_to_the_whole(make_router, hidden, masks):
    """LPR over micro-batches of one sequence each, weighted by the step's tokens, is LPR over the batch."""
    original, valid = masks
    weight = 1.0 / (original & valid).sum()
    whole = gradient_of_attached_losses(
        make_router(lpr_loss_coeff=0.1), hidden, token_tags(original, valid, lpr_weight=weight)
    )
    router = make_router(lpr_loss_coeff=0.1)
    parts = sum(
        gradient_of_attached_losses(
            router, hidden[:, i : i + 1], token_tags(original[i : i + 1], valid[i : i + 1], lpr_weight=weight)
        ).clone()
        for i in range(BATCH)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-8)


def test_evaluation_attaches_nothing_and_counts(make_router, hidden, masks):
    router = make_router(load_balancing_coeff=0.01, lpr_loss_coeff=0.1).eval()
    assert gradient_of_attached_losses(router, hidden, token_tags(*masks)).abs().max() == 0
    assert router.statistics.sums.sum() > 0


def test_a_step_that_is_not_logged_counts_nothing_and_trains_alike(make_router, hidden, masks):
    router = make_router(load_balancing_coeff=0.01, lpr_loss_coeff=0.1)
    logged = gradient_of_attached_losses(router, hidden, token_tags(*masks)).clone()
    router.statistics.reset()
    router.counts_in_training = False
    assert torch.equal(gradient_of_attached_losses(router, hidden, token_tags(*masks)), logged)
    assert router.statistics.sums.abs().sum() == router.statistics.load_balancing.abs().sum() == 0
    router.eval()(hidden, token_tags(*masks).transpose(0, 1))
    assert router.statistics.sums.sum() > 0


def test_recompute_counts_once(make_router, hidden, masks):
    router = make_router()
    tags = token_tags(*masks).transpose(0, 1)
    with torch.no_grad():
        router(hidden, tags)
    assert router.statistics.sums.sum() == 0
    router(hidden, tags)
    assert router.statistics.sums[:, 0].sum() == masks[1].sum()


def test_statistics_by_group(make_router, hidden, masks):
    router = make_router()
    original, valid = masks
    _, choices, _ = router(hidden, token_tags(original, valid).transpose(0, 1))
    logits, _ = reference_logits(router, hidden)
    chance = torch.softmax(logits.detach(), -1)[:, 0]
    report = gather_routing([(1, router.statistics)], 2, EXPERTS + 1)
    for index, group in enumerate((original & valid, ~original & valid)):
        chosen = sequence_first(group)
        assert report.tokens[1, index] == chosen.sum()
        torch.testing.assert_close(report.probability[1, index], chance[chosen].mean(), rtol=1e-6, atol=0)
        shares = choices[chosen].double().mean(0)
        torch.testing.assert_close(report.expert_share[1, index, :EXPERTS], shares, rtol=1e-6, atol=0)
        assert report.top_k_share[1, index] == pytest.approx(shares[0].item())
    assert report.probability[0].isnan().all()
    assert report.mean_over_layers(report.tokens, "original") == (0 + (original & valid).sum()) / 2


def test_weights_stay_fp32_in_bf16(make_router, hidden):
    router = make_router()
    before = router.weight.detach().clone()
    router.bfloat16()
    assert router.weight.dtype == torch.float32
    torch.testing.assert_close(router.weight, before, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        router.weight.copy_(before)
    rounded = hidden.bfloat16()
    weights, *_ = router(rounded)
    assert weights.dtype == torch.float32
    logits, _ = reference_logits(router, rounded)
    best = torch.softmax(logits, -1).topk(TOP_K, dim=-1)
    expected = torch.zeros_like(logits).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_lpr_for_groups(make_router, hidden, masks, form):
    """-log of the total probability of the experts of the token's group and the groups before it."""
    router = make_router(lpr_loss_coeff=0.1, lpr_loss_form=form, num_moe_layers=5)
    router.set_groups((1, 2), 1.0)  # experts 0 | 1 | 2 and 3
    original, valid = masks
    groups = torch.where(original, 0, 1)
    groups[0] = -1  # the latest group: no prior
    known = groups >= 0
    tags = token_tags(known, valid, lpr_weight=1.0 / (known & valid).sum(), groups=groups)
    logits, weight = reference_logits(router, hidden)
    scores = torch.softmax(logits, -1)
    scores = scores if form == "paper" else scores.exp() / scores.exp().sum(-1, keepdim=True)
    own = torch.where(sequence_first(groups) == 0, scores[:, 0], scores[:, :2].sum(-1))
    loss = -own.log()[sequence_first(known & valid)].mean()
    (0.1 / 5 * loss).backward()
    gradient = gradient_of_attached_losses(router, hidden, tags)
    torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-5, atol=1e-8)
    report = gather_routing([(0, router.statistics)], 1, EXPERTS)
    assert report.tokens[0, 0] == (groups.eq(0) & valid).sum()


@pytest.mark.parametrize("newest_weight", [0.0, 0.3])
def test_the_latest_experts_weight_in_the_softmax(make_router, hidden, newest_weight):
    """Softmax over exp(logit) times the weight: at 0 the latest expert is not there."""
    router = make_router()
    router.set_groups((2, 1), newest_weight)
    logits, _ = reference_logits(router, hidden)
    scores = logits.exp() * torch.tensor([1.0, 1.0, 1.0, newest_weight])
    best = scores.topk(TOP_K, dim=-1)
    expected = torch.zeros_like(logits).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    weights, choices, _ = router(hidden)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(choices, expected > 0)
