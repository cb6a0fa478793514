"""Tensors of safetensors files: values as saved, and files that the library or torch could not read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_moe_lpr.conversion.hugging_face.safetensors_source import SafetensorsSource
from megatron_moe_lpr.errors import UserError

TENSORS = {
    "matrix": torch.arange(12.0).view(4, 3).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "mask": torch.tensor([True, False]),
}


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_values_dtypes_and_shapes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    save_file({"other": torch.ones(2)}, tmp_path / "b.safetensors")
    source = SafetensorsSource([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert source.tensors.keys() == {*TENSORS, "other"} and source.file("other") == tmp_path / "b.safetensors"
    for name, tensor in TENSORS.items():
        assert (source.tensors[name].shape, source.tensors[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(source.read(name), tensor) and source.read(name).dtype == tensor.dtype


@pytest.mark.parametrize(
    ("header", "num_bytes", "message"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "damaged: invalid offset for tensor `b`"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "damaged: invalid offset for tensor `b`"),
        ({"a": entry([3], 0, 8)}, 8, "damaged: invalid shape"),
        ({"a": entry([2], 0, 8)}, 12, "file not fully covered"),
        ({"a": entry([2], 0, 8, "XYZ")}, 8, "unknown variant `XYZ`"),
        ({"a": entry([4], 0, 2, "F4")}, 2, "'a' is stored as 'F4'"),
        ({"a": entry([0, 2**63], 0, 0)}, 0, "'a' has an impossible shape"),
    ],
)
def test_damaged_files_are_refused_by_their_headers(header: dict, num_bytes: int, message: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    with pytest.raises(UserError) as error:
        SafetensorsSource([path])
    assert message in str(error.value) and str(error.value).startswith(f"{path}: ")


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"b.safetensors: x also lies in a.safetensors"):
        SafetensorsSource([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_a_file_that_is_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    source = SafetensorsSource([path])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        source.read("matrix")
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        source.read("matrix")
