"""Options of Megatron's that are refused: by name, with a reason, before anything is built."""

import dataclasses
import inspect

import pytest
from megatron.core.models.gpt import fine_grained_callables
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.megatron.versions import installed_version
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.config import check_options
from megatron_moe_lpr.model.configuration.refused import REASONS, RefusedOptions, check_refused
from megatron_moe_lpr.parallel.layout import ParallelLayout
from tests.planning.counted_step import Case

NAMES = [field.name for field in dataclasses.fields(RefusedOptions)]
GIVEN = {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ("attn",), "cuda_graph_modules": ("attn",)}


@pytest.mark.parametrize("name", NAMES)
def test_each_is_refused_with_its_reason(name):
    options = ComputeOptions(refused=RefusedOptions(**{name: GIVEN.get(name, True)}))
    with pytest.raises(UserError) as raised:
        check_options(Case().shape, ParallelLayout(), options)
    assert str(raised.value) == f"--{name.replace('_', '-')} is not offered: {REASONS[name]}"


def test_what_megatron_has_without_them_is_accepted():
    check_refused(RefusedOptions(cuda_graph_impl="none"))
    assert REASONS.keys() == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_names_are_megatron_s(name):
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    newer = name == "cuda_graph_modules" and installed_version().release < (0, 18)
    assert newer or name in known


def test_the_reasons_still_hold():
    """Should Megatron pass the tags on there, in `padding_mask`, these flags can be tried again."""
    replay = inspect.getsource(TransformerLayer._te_cuda_graph_replay)
    assert "layer.mlp.route(pre_mlp_layernorm_output)" in inspect.getsource(fine_grained_callables)
    assert "self._forward_mlp(*cuda_graph_output)" in replay and "padding_mask" not in replay
