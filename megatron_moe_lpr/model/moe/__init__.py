"""The MoE layer: router and losses, the original expert and the new ones, what tokens carry and choose."""
