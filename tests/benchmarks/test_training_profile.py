"""Kinds of a step's operations, and their shares of its time."""

import pytest
import torch

from benchmarks.training.profile import operation_kind, shares


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::mul", "elementwise"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::index_add_", "copies"),
        ("SwiGLUBackward", "other"),
    ],
)
def test_kinds(name, kind):
    assert operation_kind(name) == kind


def test_shares_of_a_product():
    matrix = torch.ones(512, 512)
    found = shares(lambda: matrix @ matrix)
    assert sum(found.values()) == pytest.approx(1)
    assert found["products"] > 0.5
