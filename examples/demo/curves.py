"""What the target `scaling` has evaluated, as curves for tools/report.py --curves."""

import dataclasses
import json
from pathlib import Path

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.filesystem import atomic_file


@dataclasses.dataclass
class Flags:
    """What the target `scaling` has evaluated, as curves."""

    table: Path
    """Directory of `paper-table`, with the results of `scaling` in its directory scaling."""
    full: Path
    """Directory of `full`, whose stage 1 the reviews with more and less replay go on from."""
    replays: list[int]
    """Documents of each original language in these reviews."""
    seed: int
    """Which of the table's runs stands for the demo's own settings."""
    output: Path
    """JSON file to write."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    with atomic_file(flags.output) as partial:
        partial.write_text(json.dumps(curves(flags), indent=2) + "\n", encoding="utf-8")


def curves(flags: Flags) -> list[dict]:
    """The three of them."""
    own = f"{flags.table}/seed-{flags.seed}/evaluation/stage2.json"

    def scaled(name: str) -> str:
        return f"{flags.table}/scaling/evaluation/{name}.json"

    return [
        curve(
            "How many experts?",
            "experts in a layer, the original one included",
            "More new experts mean more room for the new languages and more to choose from for the router. Every token "
            "uses two of them, however many there are.",
            {"3": scaled("experts-3"), "5": own, "9": scaled("experts-9")},
        ),
        curve(
            "How much text of the old languages does the review need?",
            "text to replay, as a share of stage 1's tokens",
            "The same review after the same stage 1 over the whole corpus; only the number of documents of the old "
            f"languages differs, which the review reads again and again: {listed(flags.replays)} of each language.",
            {replay_share(flags, documents): scaled(f"replay-{documents}") for documents in flags.replays},
        ),
        curve(
            "One more new language",
            "new languages",
            "Greek, Hungarian and Turkish alone, or with Czech beside them; each language has as many tokens "
            "in both. The figures are those of the languages that both have learned.",
            {"3": own, "4": scaled("cs")},
        ),
    ]


def listed(numbers: list[int]) -> str:
    """In words: 1, 3 or 11."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def replay_share(flags: Flags, documents: int) -> str:
    """Tokens of so many documents of each original language, as a share of what stage 1 reads."""
    replay = tokens(flags.table / "data", f"replay-{documents}-*.json")
    return f"{100 * replay / tokens(flags.full / 'data', 'train-*.json'):.2g}%"


def tokens(directory: Path, datasets: str) -> int:
    """Of all datasets whose manifests have such names.

    Raises:
        UserError: there are none.
    """
    manifests = sorted(directory.glob(datasets))
    if not manifests:
        raise UserError(f"{directory / datasets}: no such datasets; run `make paper-scaling`, which makes them")
    return sum(json.loads(path.read_text(encoding="utf-8"))["tokens"] for path in manifests)


def curve(title: str, setting: str, caption: str, points: dict[str, str]) -> dict:
    """One curve, from values of the setting to evaluations."""
    return {
        "title": title,
        "setting": setting,
        "caption": caption,
        "points": [{"value": value, "evaluations": [file]} for value, file in points.items()],
    }


if __name__ == "__main__":
    run_command(main)
