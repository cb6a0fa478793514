"""FP8 scales of grouped experts: every expert keeps its own, however many a rank holds."""

import torch

from megatron_moe_lpr.model.moe.expert_states import merge_states, split_state

STEPS = 4


def grouped(experts: int) -> dict:
    """A layer's state as Transformer Engine keeps it: expert by expert, the tensors of each side by side."""
    return {
        "recipe": "delayed",
        "extra_fp8_variables": {"num_gemms": experts, "fp8_checkpoint": True},
        "scale_fwd": torch.arange(3.0 * experts),
        "amax_history_fwd": torch.arange(STEPS * 3.0 * experts).view(STEPS, -1),
        "scale_bwd": torch.arange(2.0 * experts),
        "amax_history_bwd": torch.arange(STEPS * 2.0 * experts).view(STEPS, -1),
    }


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value, name


def test_each_expert_gets_its_own_scales():
    parts = split_state(grouped(4), 4)
    assert parts[2]["scale_fwd"].tolist() == [6.0, 7.0, 8.0]  # input, weight, output of the third expert
    assert parts[2]["scale_bwd"].tolist() == [4.0, 5.0]
    assert parts[2]["amax_history_fwd"][:, 0].tolist() == [6.0, 18.0, 30.0, 42.0]
    assert parts[2]["extra_fp8_variables"] == {"num_gemms": 1, "fp8_checkpoint": True}


def test_another_number_of_ranks_gets_the_same_scales():
    """Saved by one rank with four experts, loaded by two with two each, and back."""
    whole = grouped(4)
    parts = split_state(whole, 4)
    ranks = [merge_states(parts[:2]), merge_states(parts[2:])]
    assert ranks[1]["scale_fwd"].tolist() == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    again = [part for rank in ranks for part in split_state(rank, 2)]
    assert_same(merge_states(again), whole)


def test_recipes_without_history_have_nothing_to_split():
    state = {"recipe": "tensorwise", "extra_fp8_variables": {"num_gemms": 2}}
    assert_same(merge_states(split_state(state, 2)), state)
