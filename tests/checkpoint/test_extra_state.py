"""What Transformer Engine would unpickle from a checkpoint is looked at first."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.extra_state import check_extra_states
from megatron_moe_lpr.errors import UserError


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
    check_extra_states({"model": {f"a._extra_state{index}": value for index, value in enumerate(values)}}, tmp_path)


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
