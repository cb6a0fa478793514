"""Write the evaluations of the target `scaling` as curves for `moe-lpr report --curves`."""

import dataclasses
import json
from pathlib import Path

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.files.json_files import write_json


@dataclasses.dataclass
class Flags:
    """Write the evaluations of the target `scaling` as curves."""

    table: Path
    """Directory of `paper-table`, with the results of `scaling` in its directory scaling."""
    full: Path
    """Directory of `full`, from whose stage 1 the reviews with more and less replay start."""
    replays: list[int]
    """Documents of each original language in the reviews with more and less replay."""
    seed: int
    """Seed of the table's run that has the demo's own settings."""
    output: Path
    """JSON file to write."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = parse_flags(Flags, arguments, __doc__)
    write_json(curves(flags), flags.output)


def curves(flags: Flags) -> list[dict]:
    """Return all three curves."""
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
    """Return numbers as text: 1, 3 or 11."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def replay_share(flags: Flags, documents: int) -> str:
    """Return the tokens of so many documents of each original language, as a fraction of the tokens of stage 1."""
    replay = tokens(flags.table / "data", f"replay-{documents}-*.json")
    return f"{100 * replay / tokens(flags.full / 'data', 'train-*.json'):.2g}%"


def tokens(directory: Path, datasets: str) -> int:
    """Return the tokens of all datasets whose manifests match a glob pattern.

    Raises:
        UserError: no manifest matches.
    """
    manifests = sorted(directory.glob(datasets))
    if not manifests:
        raise UserError(f"{directory / datasets}: no such datasets; run `make paper-scaling`, which makes them")
    return sum(json.loads(path.read_text(encoding="utf-8"))["tokens"] for path in manifests)


def curve(title: str, setting: str, caption: str, points: dict[str, str]) -> dict:
    """Return one curve, from evaluations by value of the setting."""
    return {
        "title": title,
        "setting": setting,
        "caption": caption,
        "points": [{"value": value, "evaluations": [file]} for value, file in points.items()],
    }


if __name__ == "__main__":
    run_command(main)
