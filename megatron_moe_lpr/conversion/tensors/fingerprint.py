"""A digest of the dense model's weights: the same before and after training, since they are frozen."""

import hashlib

import torch


class OriginalFingerprint:
    """Fingerprint of the original weights, each under its name in the dense checkpoint.

    It is the SHA-256 of the tensors' own SHA-256 sorted by name, so that tensors can be added in any order.
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a contiguous CPU tensor of any shape and dtype."""
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self.digests[name] = digest.hexdigest()

    def hexdigest(self) -> str:
        """The fingerprint of all tensors added so far."""
        lines = "".join(f"{name} {self.digests[name]}\n" for name in sorted(self.digests))
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
