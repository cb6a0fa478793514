"""The published allocations, and what budget, multiples and uniform counts make of them."""

import pytest

from megatron_moe_lpr.allocation.arithmetic import AllocationOptions, allocate, published_allocation
from megatron_moe_lpr.errors import UserError

# Llama-3.2-3B, el hu tr beside en es zh: S of each layer and the experts in the authors' own table (similarity/ of
# their repository), B = 70.
LLAMA_AMONG_EXPANDED = """0.039067 0.042967 0.038167 0.055767 0.0708 0.077467 0.092467 0.1038 0.101567 0.1061 0.114733
0.1185 0.1271 0.1201 0.128733 0.1266 0.112133 0.1035 0.096333 0.093733 0.087433 0.0752 0.073867 0.059933 0.053533
0.051367 0.0528 0.049933"""
LLAMA_ACROSS = """0.032811 0.037467 0.032267 0.044922 0.056311 0.062056 0.075989 0.088222 0.087411 0.089444 0.097178
0.100256 0.105789 0.094778 0.101578 0.095111 0.082367 0.077967 0.069733 0.073344 0.068222 0.061456 0.063067 0.049667
0.046089 0.047956 0.0434 0.040756"""
LLAMA = [5, 5, 5, 4, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4]
QWEN = [5, 4, 3, 5, 4, 3, 2, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4, 3, 3]


@pytest.fixture
def llama() -> list[float]:
    pairs = zip(LLAMA_AMONG_EXPANDED.split(), LLAMA_ACROSS.split(), strict=True)
    return [(float(among) + float(across)) / 2 for among, across in pairs]


def test_the_published_example(llama):
    assert published_allocation(llama, 70) == LLAMA
    assert sum(LLAMA) == 84


def test_its_budget_gives_it_back(llama):
    assert allocate(llama, AllocationOptions(budget=56)) == LLAMA
    assert allocate(llama, AllocationOptions()) == LLAMA


def test_the_published_list_for_qwen():
    """Its similarities are not published; those in the middle of what rounds up to the list give it back."""
    similarity = [1 / (count - 0.5) for count in QWEN]
    assert published_allocation(similarity, sum(count - 0.5 for count in QWEN)) == QWEN
    assert allocate(similarity, AllocationOptions()) == QWEN
    assert sum(QWEN) - len(QWEN) == 48


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("budget", [8, 20, 57, 140])
def test_budget_and_multiples(llama, multiple, budget):
    experts = allocate(llama, AllocationOptions(budget=budget, multiple_of=multiple))
    new = [count - 1 for count in experts]
    assert 0 < sum(new) <= budget and all(count % multiple == 0 for count in new)
    assert sum(new) > budget - 2 * multiple  # no more is left over than ties between layers explain


def test_less_alike_layers_get_more(llama):
    experts = allocate(llama, AllocationOptions(budget=100))
    by_similarity = [count for _, count in sorted(zip(llama, experts, strict=True), key=lambda pair: pair[0])]
    assert by_similarity == sorted(by_similarity, reverse=True)


def test_uniform_count_and_dense_layers(llama):
    experts = allocate(llama, AllocationOptions(budget=22, uniform_count=6, dense_layers=(0,)))
    assert experts[0] == 1 and sorted(set(experts)) == [1, 6] and experts.count(6) == 4
    least_alike = sorted(range(1, 28), key=lambda layer: llama[layer])[:4]
    assert [layer for layer, count in enumerate(experts) if count == 6] == sorted(least_alike)
    assert allocate(llama, AllocationOptions(budget=30, dense_layers=(0, 1)))[:2] == [1, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (AllocationOptions(budget=0), "--budget 0"),
        (AllocationOptions(multiple_of=0), "--multiple-of 0"),
        (AllocationOptions(budget=3, multiple_of=4), "--budget 3: too few"),
        (AllocationOptions(uniform_count=1), "--uniform-count 1"),
        (AllocationOptions(uniform_count=4, multiple_of=2), "not a multiple"),
        (AllocationOptions(dense_layers=(28,)), "layers are 0 to 27"),
        (AllocationOptions(dense_layers=tuple(range(28))), "names every layer"),
    ],
)
def test_what_does_not_fit_is_refused(llama, options, words):
    with pytest.raises(UserError, match=words):
        allocate(llama, options)


def test_similarity_must_be_positive():
    with pytest.raises(UserError, match=r"layer 1: .* above 0"):
        allocate([0.1, -0.01], AllocationOptions())
