"""A digest of the dense model's weights: equal before and after training, because they are frozen."""

import hashlib

import torch


class OriginalFingerprint:
    """Collects the original weights, each under the name that the dense checkpoint gives it.

    Each tensor has a SHA-256 of its own, and the fingerprint is the SHA-256 of them sorted by name, so the order of
    arrival does not matter and no file has to be read twice.
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
