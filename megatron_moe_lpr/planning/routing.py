"""How often tokens choose each expert: balanced, given, or as an evaluation found it."""

import dataclasses

from megatron_moe_lpr.model.config import ModelShape


@dataclasses.dataclass(frozen=True)
class Routing:
    """Share of the tokens that have each expert among their top k."""

    layers: tuple[tuple[float, ...], ...] = ()
    """Of each MoE layer in turn, from the first again where a model has more; a row sums to k. Empty: balanced."""

    def shares(self, shape: ModelShape, layer: int) -> tuple[float, ...]:
        """Of each expert of a layer, the original one first. Where the layer has another number of experts than the
        routing, the original expert keeps its share and the others have the rest in equal parts."""
        experts = shape.experts_per_layer[layer]
        if not self.layers:
            return (shape.top_k / experts,) * experts
        index = sum(count > 1 for count in shape.experts_per_layer[:layer])
        found = self.layers[index % len(self.layers)]
        if len(found) == experts:
            return found
        return found[0], *((shape.top_k - found[0]) / (experts - 1),) * (experts - 1)
