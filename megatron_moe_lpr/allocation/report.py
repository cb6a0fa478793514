"""An allocation as a table for people, JSON for programs, and a picture."""

import dataclasses
from html import escape
from typing import Any

from rich.table import Table

from megatron_moe_lpr.conversion.experts_per_layer import FIELD

WIDTH, HEIGHT, MARGIN = 720, 320, 44
EXPERTS_COLOUR, SIMILARITY_COLOUR, PROBE_COLOUR = "#cbd5e1", "#2563eb", "#ea580c"
POOR = 0.97
"""Below this share of tokens on the right side a layer is marked."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured in each layer, and what was made of it."""

    similarity: list[float]
    separability: list[float]
    experts: list[int]

    def record(self) -> dict[str, Any]:
        """For a JSON file that `--experts-per-layer` reads."""
        return {
            FIELD: self.experts,
            "new_experts": sum(self.experts) - len(self.experts),
            "similarity": self.similarity,
            "separability": self.separability,
        }

    def table(self) -> Table:
        """A line for each layer."""
        table = Table("layer", "similarity", "router can separate", "experts", title_justify="left")
        table.title = f"{sum(self.experts) - len(self.experts)} new experts in {len(self.experts)} layers"
        for layer, experts in enumerate(self.experts):
            separable = f"{self.separability[layer]:.1%}" + (" poor" if self.separability[layer] < POOR else "")
            words = "dense" if experts == 1 else str(experts)
            table.add_row(str(layer), f"{self.similarity[layer]:.4f}", separable, words)
        return table

    def plot(self) -> str:
        """SVG: bars for experts, lines for similarity (over its largest value) and separability, by layer."""
        step = (WIDTH - 2 * MARGIN) / len(self.experts)
        tallest, largest = max(self.experts), max(self.similarity)
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">']
        for layer, experts in enumerate(self.experts):
            x, y = MARGIN + layer * step, _height(experts / tallest)
            size = f'width="{0.8 * step:.1f}" height="{HEIGHT - MARGIN - y:.1f}"'
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{EXPERTS_COLOUR}"/>')
            parts.append(_text(x + 0.4 * step, HEIGHT - MARGIN + 16, str(layer)))
            parts.append(_text(x + 0.4 * step, y - 4, str(experts)))
        parts.append(_line([value / largest for value in self.similarity], step, SIMILARITY_COLOUR))
        parts.append(_line([2 * value - 1 for value in self.separability], step, PROBE_COLOUR))
        words = f"grey: experts · blue: similarity, up to {largest:.3f} · orange: router can separate, 50% to 100%"
        parts += [_text(WIDTH / 2, 16, words), _text(WIDTH / 2, HEIGHT - 8, "layer"), "</svg>\n"]
        return "\n".join(parts)


def _height(share: float) -> float:
    return HEIGHT - MARGIN - max(share, 0.0) * (HEIGHT - 2 * MARGIN)


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" font-size="12">{escape(words)}</text>'


def _line(shares: list[float], step: float, colour: str) -> str:
    points = " ".join(f"{MARGIN + (i + 0.4) * step:.1f},{_height(share):.1f}" for i, share in enumerate(shares))
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
