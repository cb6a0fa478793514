"""An allocation of experts as a table, as JSON and as an SVG picture."""

import dataclasses
from typing import Any

from markupsafe import Markup
from rich.table import Table

from megatron_moe_lpr.conversion.experts_per_layer import FIELD
from megatron_moe_lpr.svg import Frame, element

MARGIN = 44
"""Pixels on all sides of the picture."""
EXPERTS_COLOUR, SIMILARITY_COLOUR, PROBE_COLOUR = "#cbd5e1", "#2563eb", "#ea580c"
POOR = 0.97
"""A layer is marked if the router separates a smaller fraction of tokens correctly."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Similarity and separability of each layer, and the experts allocated to it."""

    similarity: list[float]
    separability: list[float]
    experts: list[int]

    def record(self) -> dict[str, Any]:
        """Return the JSON object that `--experts-per-layer` reads."""
        return {
            FIELD: self.experts,
            "new_experts": sum(self.experts) - len(self.experts),
            "similarity": self.similarity,
            "separability": self.separability,
        }

    def table(self) -> Table:
        """Return a table with a row for each layer."""
        table = Table("layer", "similarity", "router can separate", "experts", title_justify="left")
        table.title = f"{sum(self.experts) - len(self.experts)} new experts in {len(self.experts)} layers"
        for layer, experts in enumerate(self.experts):
            separable = f"{self.separability[layer]:.1%}" + (" poor" if self.separability[layer] < POOR else "")
            words = "dense" if experts == 1 else str(experts)
            table.add_row(str(layer), f"{self.similarity[layer]:.4f}", separable, words)
        return table

    def plot(self) -> str:
        """Draw bars for experts, lines for similarity (over its largest value) and separability, by layer."""
        frame = Frame(len(self.experts), 0, 1, 720, 320, MARGIN, MARGIN, MARGIN, MARGIN)
        tallest, largest = max(self.experts), max(self.similarity)
        parts: list[Markup] = []
        for layer, experts in enumerate(self.experts):
            (left, top), (right, bottom) = frame.place(layer, experts / tallest), frame.place(layer + 0.8, 0)
            size = {"width": right - left, "height": bottom - top}
            parts.append(element("rect", x=left, y=top, **size, fill=EXPERTS_COLOUR))
            middle = (left + right) / 2
            parts += [_text(middle, bottom + 16, str(layer)), _text(middle, top - 4, str(experts))]
        lines = (
            ([value / largest for value in self.similarity], SIMILARITY_COLOUR),
            ([2 * value - 1 for value in self.separability], PROBE_COLOUR),
        )
        # At the middle of the bars; nothing is drawn below the axis.
        parts += [frame.line([(i + 0.4, max(y, 0.0)) for i, y in enumerate(ys)], colour) for ys, colour in lines]
        words = f"grey: experts · blue: similarity, up to {largest:.3f} · orange: router can separate, 50% to 100%"
        parts += [_text(frame.width / 2, 16, words), _text(frame.width / 2, frame.height - 8, "layer")]
        return frame.draw(*parts, xmlns="http://www.w3.org/2000/svg", font_family="sans-serif") + "\n"


def _text(x: float, y: float, words: str) -> Markup:
    return element("text", words, x=x, y=y, text_anchor="middle", font_size=12)
