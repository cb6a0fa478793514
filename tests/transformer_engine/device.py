"""Answers of torch.cuda for constructing Transformer Engine's modules where there is no device: those of an H100."""

import types

import torch

CAPABILITY = (9, 0)


def install() -> None:
    """Answer what constructors ask. Call it after the CPU platform was chosen; kernels stay out of reach."""
    cuda = torch.cuda
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
    )
    # module/base.py: "TransformerEngine needs CUDA"
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.get_device_name = lambda *args, **kwargs: properties.name
    # quantization.py: which recipes the device has; dot_product_attention/utils.py: which attention kernels
    cuda.get_device_capability = lambda *args, **kwargs: CAPABILITY
    # quantization.py, from 2.17 on: whether a graph is being captured
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_properties = lambda *args, **kwargs: properties
    # quantization.py: block scaling asks which CUDA PyTorch was built for
    torch.version.cuda = "13.0"
