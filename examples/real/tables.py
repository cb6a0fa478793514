"""The tables of the report, each as a grid of texts that HTML and Markdown show alike."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from examples.real.figures import GROUPS, Figures

NONE = "–"


@dataclass(frozen=True)
class Grid:
    """A table: what it is called, a sentence about it, and texts; the first column names the row."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table alone in Markdown, numbers to the right."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def summary(figures: Figures) -> Grid:
    """Return the table of the README: a row for each model."""
    kinds = ["text", *(["other_text"] if figures.models[figures.base]["other_text"] else [])]
    names = {"text": "held-out text", "other_text": "other text"}
    places = [(kind, group) for kind in kinds for group in GROUPS[:2] if group in figures.columns(kind)]
    languages = {name: ", ".join(getattr(figures.inputs, name)) for name in GROUPS[:2]}
    header = ["model", *(f"{names[kind]}, {languages[group]}" for kind, group in places)]
    header += ["grammar", "same answers", "parameters (active)", "bytes/s"]

    def row(name: str) -> list[str]:
        bits = [f"{figures.mean_bits(name, *place):.3f}{changed(figures, name, *place)}" for place in places]
        costs = figures.costs[name]
        size = f"{costs['parameters'] / 1e6:,.0f}M ({costs['active_parameters'] / 1e6:,.0f}M)"
        speed = f"{figures.bytes_per_second(name, 'expanded'):,.0f}"
        return [name, *bits, percent(figures.accuracy(name)), same_answers(figures, name), size, speed]

    note = (
        "Bits per byte of held-out text, lower is better; in brackets the change from the base model. Grammar: of "
        "pairs of English sentences, those whose grammatical one is the likelier. Same answers: of ten English "
        "questions, "
        "those that are answered word for word as by the base model. Bytes a second: greedy, in the new languages, by "
        f"{figures.engine}."
    )
    return Grid("All in one table", note, header, [row(name) for name in figures.models])


def changed(figures: Figures, name: str, kind: str, group: str) -> str:
    """Return the change from the base model in brackets; nothing for that model itself."""
    return "" if name == figures.base else f" ({figures.change(name, kind, group):+.1%})"


def bits(figures: Figures, kind: str, title: str, note: str) -> Grid:
    """Return bits per byte of every text, and each group's mean and change."""
    texts, header = figures.models[figures.base][kind], ["model"]
    for group, places in figures.columns(kind).items():
        header += [label(texts[at]) for at in places]
        header += ["change"] if len(places) == 1 else [f"{group} mean", "change"]

    def row(name: str) -> list[str]:
        cells = [name]
        for group, places in figures.columns(kind).items():
            cells += [f"{figures.models[name][kind][at]['bits_per_byte']:.3f}" for at in places]
            change = "" if name == figures.base else f"{figures.change(name, kind, group):+.1%}"
            cells += [change] if len(places) == 1 else [f"{figures.mean_bits(name, kind, group):.3f}", change]
        return cells

    return Grid(title, note, header, [row(name) for name in figures.models])


def label(text: dict[str, object]) -> str:
    """Return the language of a text, after its name if it has one."""
    return f"{text['name']} {text['language']}".strip()


def text_bits(figures: Figures) -> Grid:
    """Return bits per byte of the corpus' validation text."""
    note = (
        f"Held-out pages of the corpus, up to {figures.inputs.validation_bytes:,} bytes of each language, the same for "
        "all models. Unseen are languages that no run has trained on."
    )
    return bits(figures, "text", "Validation text: bits per byte", note)


def other_bits(figures: Figures) -> Grid:
    """Return bits per byte of text of another kind."""
    note = (
        "Text that resembles neither the corpus nor anything else that was trained on, up to "
        f"{figures.inputs.text_bytes:,} bytes of each file."
    )
    return bits(figures, "other_text", "Text of another kind: bits per byte", note)


def grammar(figures: Figures) -> Grid:
    """Return how often each model prefers the grammatical sentence, and how often otherwise than the base model."""
    base = figures.models[figures.base]["pairs"]

    def row(name: str) -> list[str]:
        found, accuracy = figures.models[name]["pairs"], figures.accuracy(name) or 0
        points = (accuracy - (figures.accuracy(figures.base) or 0)) * 100
        gained = sum(now and not before for now, before in zip(found, base, strict=True))
        lost = sum(before and not now for now, before in zip(found, base, strict=True))
        return [name, percent(accuracy), *(["", "", ""] if name == figures.base else [f"{points:+.1f}", gained, lost])]

    note = (
        f"{len(base):,} pairs of English sentences that differ in one point of grammar: the share whose grammatical "
        "one has the higher probability, the sum over its tokens' logarithms after a line break (and the BOS token, "
        "where the tokenizer has one)."
    )
    header = ["model", "right", "points", "right now, wrong before", "wrong now, right before"]
    return Grid("English grammar", note, header, [[str(cell) for cell in row(name)] for name in figures.models])


def tokens(figures: Figures) -> Grid:
    """Return bytes a token of each language, for each different tokenizer."""
    places = [at for some in figures.columns("text").values() for at in some]
    texts = figures.models[figures.base]["text"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, model in figures.models.items():
        widths = tuple(f"{model['text'][at]['bytes'] / model['text'][at]['tokens']:.2f}" for at in places)
        rows.setdefault(widths, []).append(name)
    note = (
        "UTF-8 bytes of a token in the validation text. The more, the fewer tokens to train on, to hold and to write."
    )
    header = ["tokenizer", *(texts[at]["language"] for at in places)]
    return Grid("Bytes a token", note, header, [["; ".join(names), *widths] for widths, names in rows.items()])


def speed(figures: Figures) -> Grid:
    """Return size and speed of each model."""
    base = figures.costs[figures.base]["generated_tokens_per_second"]

    def row(name: str) -> list[str]:
        costs = figures.costs[name]
        rate = costs["generated_tokens_per_second"]
        places = [group for group in GROUPS[:2] if group in figures.columns("text")]
        return [
            name,
            *(millions(costs[key]) for key in ("parameters", "active_parameters")),
            f"{rate:,.1f} ({rate / base:.2f}x)",
            *(speeds(figures, name, group) for group in places),
        ]

    note = (
        "As exported: a stock class may hold copies in layers without new experts. A token uses of a mixture only the "
        "experts that it chooses: these parameters are active. Greedy, one text at a time, by "
        f"{figures.engine}; bytes are tokens by the bytes of a token above."
    )
    groups = [f"bytes/s, {group} languages" for group in GROUPS[:2] if group in figures.columns("text")]
    header = ["model", "parameters", "active", "tokens/s", *groups]
    return Grid("Size and speed", note, header, [row(name) for name in figures.models])


def speeds(figures: Figures, name: str, group: str) -> str:
    """Return bytes a second in a group's languages, also as a multiple of the base model's."""
    rate = figures.bytes_per_second(name, group)
    return f"{rate:,.0f} ({rate / figures.bytes_per_second(figures.base, group):.2f}x)"


def steps(figures: Figures) -> Grid:
    """Return time, memory and speed of each step, and the time of all."""
    rows = [
        [
            step["name"],
            minutes(step["seconds"]),
            gigabytes(step.get("peak_memory_bytes")),
            f"{step['tokens_per_second']:,.0f}" if step.get("tokens_per_second") else NONE,
        ]
        for step in figures.steps
    ]
    rows.append(["all steps", minutes(sum(step["seconds"] for step in figures.steps)), "", ""])
    note = (
        "The largest memory of all processes of a step together. Tokens a second of training, without starts and saves."
    )
    return Grid("Steps", note, ["step", "time", "memory", "tokens/s"], rows)


def all_tables(figures: Figures) -> list[Grid]:
    """Return all tables of what was measured, the summary first."""
    first = figures.models[figures.base]
    makers: Iterable[tuple[Callable[[Figures], Grid], object]] = (
        (summary, True),
        (text_bits, True),
        (other_bits, first["other_text"]),
        (grammar, first["pairs"]),
        (tokens, True),
        (speed, True),
        (steps, figures.steps),
    )
    return [make(figures) for make, is_measured in makers if is_measured]


def same_answers(figures: Figures, name: str) -> str:
    """Return identical answers of all; a dash for the model that they are compared with."""
    return NONE if name == figures.base else f"{figures.identical(name)} of {len(figures.models[name]['answers'])}"


def percent(share: float | None) -> str:
    """Format a share as 71.3%; a dash for None."""
    return NONE if share is None else f"{share:.1%}"


def millions(number: float) -> str:
    """Format a number of parameters as 134.5M."""
    return f"{number / 1e6:,.1f}M"


def minutes(seconds: float) -> str:
    """Format seconds as 3 min 20 s."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest} s" if whole else f"{rest} s"


def gigabytes(num_bytes: float | None) -> str:
    """Format bytes as 1.4 GB; a dash for None and 0."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes else NONE
