"""What Transformer Engine unpickles from a checkpoint is made anew from checked values."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.writer import CheckpointWriter
from megatron_moe_lpr.checkpoint.loading.distributed_loading import load_distributed
from megatron_moe_lpr.checkpoint.untrusted.extra_state import check_extra_states
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.platform.collectives import world_of_one
from tests.fuzzing.canary import state_of
from tests.fuzzing.opcodes import name, text
from tests.fuzzing.pickles import EXTRA_STATE_NAMES
from tests.fuzzing.recipes import DelayedScaling, stand_in


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def in_bytes(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def test_scales_pass(tmp_path: Path) -> None:
    scales = {
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.zeros(4, 3),
        "extra_fp8_variables": {"num_gemms": 1},
    }
    stream = io.BytesIO()
    torch.save(scales, stream)
    values = (in_bytes(scales), stream, torch.empty(0, dtype=torch.uint8), io.BytesIO(), None)
    state = {"model": {f"a._extra_state{index}": value for index, value in enumerate(values)}}
    check_extra_states(state, tmp_path)
    made = list(state["model"].values())
    for value in made[:2]:
        found = pickle.loads(value.numpy().tobytes())  # written by check_extra_states
        assert found.keys() == scales.keys() and found["extra_fp8_variables"] == scales["extra_fp8_variables"]
        assert all(torch.equal(found[name], scales[name]) for name in ("scale_fwd", "amax_history_fwd"))
    assert [value is None or value.numel() for value in made[2:]] == [0, 0, True]


def test_a_recipe_is_made_by_its_own_constructor(tmp_path: Path) -> None:
    with stand_in() as module:
        recipe = module.DelayedScaling(margin=2, fp8_format=module.Format.E4M3, amax_history_len=7)
        recipe.derived = module.QParams(amax_epsilon=0.5)
        recipe.of_another_version = 3
        variables = {"num_gemms": 2, "local_recipes": [recipe], "name": "a", "sizes": (1, 2.0, None)}
        saved = in_bytes({"recipe": recipe, "extra_fp8_variables": variables})
        state = {"layer._extra_state": saved}
        check_extra_states(state, tmp_path)
        found = pickle.loads(state["layer._extra_state"].numpy().tobytes())  # written by check_extra_states
        del recipe.of_another_version
        assert vars(found["recipe"]) == vars(recipe) and found["recipe"].fp8_format is module.Format.E4M3
        assert found["extra_fp8_variables"] == variables
        recipe.margin = "many"
        with pytest.raises(UserError, match="as pydantic refuses it"):
            check_extra_states({"_extra_state": in_bytes({"recipe": recipe})}, tmp_path)


MODULE = "transformer_engine.common.recipe"
FORMAT, SCALING = name(MODULE, "Format"), name(MODULE, "DelayedScaling")
GETATTR = name("builtins", "getattr")
MEMBER = GETATTR + FORMAT + text("HYBRID") + b"\x86R"
TABLE = b"}" + text("_value_") + text("other") + b"s"
VICTIM = b"}" + text("_member_map_") + b"}" + text("__init__") + FORMAT + b"ss"
REACH = GETATTR + FORMAT + text("__init__") + b"\x86R"
HOSTILE = {
    "BUILD on an enumeration": FORMAT + b"(N" + VICTIM + b"tb0}.",
    "BUILD on a class": SCALING + TABLE + b"b0}.",
    "BUILD on a member": MEMBER + TABLE + b"b0}.",
    "BUILD on a member by value": FORMAT + name(MODULE, "_FormatHelper") + b"KdKd\x86\x81\x85R" + TABLE + b"b0}.",
    "SETITEM on a class": SCALING + text("margin") + b"K\1s0}.",
    "an attribute of a class": b"}" + text("a") + REACH + b"s.",
    "a call of an attribute": b"}" + text("a") + REACH + b")Rs.",
    "a class instead of a value": b"}" + text("a") + FORMAT + b"s.",
    "a recipe that is none": b"}" + text("recipe") + text("a") + b"s.",
    "a variable in the place of an object": b"}" + text("extra_fp8_variables") + b"}" + text("scaling_fwd") + b"K\1ss.",
    "a number of experts without end": b"}"
    + text("extra_fp8_variables")
    + b"}"
    + text("num_gemms")
    + b"J\xff\xff\xff\x7fss.",
    "a field that is none": b"}" + text("recipe") + SCALING + b")\x81}" + text("__class__") + FORMAT + b"sbs.",
    "a dotted name": b"}" + text("a") + text(MODULE) + text("Format.HYBRID") + b"\x93s.",
    "lists in lists, 10^8 values": b"}"
    + text("a")
    + b"]q\0"
    + b"".join(b"](" + bytes([ord("h"), level]) * 100 + b"eq" + bytes([level + 1]) for level in range(4))
    + b"h\4s.",
    "recipes in recipes, 2^40 of them": SCALING
    + b")\x81q\0"
    + b"".join(SCALING + b")\x81}(" + text("a") + b"h\0" + text("b") + b"h\0ubq\0" for _ in range(40))
    + b"0}"
    + text("recipe")
    + b"h\0s.",
    "another class of the module": b"}" + text("a") + name(MODULE, "sys") + b"s.",
}


@pytest.mark.parametrize("action", HOSTILE)
def test_a_hostile_action_changes_nothing(action: str, tmp_path: Path) -> None:
    state = {"layer._extra_state": torch.frombuffer(bytearray(b"\x80\x02" + HOSTILE[action]), dtype=torch.uint8)}
    with stand_in() as module:
        before = state_of(EXTRA_STATE_NAMES)
        with pytest.raises(UserError, match=r"the object layer\._extra_state cannot be read: "):
            check_extra_states(state, tmp_path)
        assert state_of(EXTRA_STATE_NAMES) == before and module.Format.HYBRID.value == (448, 57344)


def test_a_loaded_checkpoint_holds_no_foreign_bytes(tmp_path: Path) -> None:
    """The state comes from the file of plain values, in the place of the model's own."""
    with CheckpointWriter(tmp_path, {}) as writer:
        writer.write("decoder.a", torch.ones(1))
    common = torch.load(tmp_path / "common.pt", weights_only=True)
    with stand_in(), world_of_one():
        saved = in_bytes({"recipe": DelayedScaling(margin=2)})
        saved = torch.cat([saved, torch.full((9,), 7, dtype=torch.uint8)])  # behind the pickle's end
        torch.save(common | {"model": {"a._extra_state": saved}}, tmp_path / "common.pt")
        found = load_distributed({}, tmp_path)["model"]["a._extra_state"]
        assert pickle.loads(found.numpy().tobytes())["recipe"] == DelayedScaling(margin=2)  # its own
        assert b"\7" * 9 not in found.numpy().tobytes()
        hostile = torch.frombuffer(bytearray(b"\x80\x02" + HOSTILE["BUILD on a class"]), dtype=torch.uint8)
        torch.save(common | {"model": {"a._extra_state": hostile}}, tmp_path / "common.pt")
        with pytest.raises(UserError, match=r"the object model\.a\._extra_state cannot be read"):
            load_distributed({}, tmp_path)


def test_a_tensor_takes_no_memory_that_its_storage_has_not(tmp_path: Path) -> None:
    """Of one number, each of a million times a million rows."""
    tensor = torch.ones(1).as_strided((1 << 20, 1 << 20), (0, 0))
    with pytest.raises(UserError, match="larger than its storage"):
        check_extra_states({"_extra_state": in_bytes({"amax_history_fwd": tensor})}, tmp_path)


@pytest.mark.parametrize("form", ["tensor", "stream", "storage"])
def test_payload_is_refused(form: str, tmp_path: Path) -> None:
    payload = Payload(tmp_path / "mark")
    stream = io.BytesIO()
    torch.save(payload, stream)
    value = {"tensor": in_bytes({"scale_fwd": payload}), "stream": stream, "storage": in_bytes(_Storage(payload))}[form]
    with pytest.raises(UserError, match=r"the object model\.layer\._extra_state cannot be read"):
        check_extra_states({"model": {"layer._extra_state": value}}, tmp_path)
    assert not (tmp_path / "mark").exists()


class _Storage:
    """Pickled as a tensor's storage is, with a pickle inside."""

    def __init__(self, payload: Payload) -> None:
        self.payload = payload

    def __reduce__(self):
        stream = io.BytesIO()
        torch.save(self.payload, stream)
        return torch.storage._load_from_bytes, (stream.getvalue(),)
