"""What the extension of one version of Transformer Engine has and that of another has not: the table in docs/gpu.md.

    python -m tests.emulation.differences [OLD NEW]
"""

import sys
from collections.abc import Iterator

from tests.emulation.table import VERSIONS, Signature, Table, read


def differences(old: Table, new: Table) -> Iterator[tuple[str, str, str]]:
    """Name, kind of change (gone, new, changed) and what of it, sorted by kind and name."""
    for name in sorted(old.lines.keys() - new.lines.keys()):
        yield name, "gone", ""
    for name in sorted(new.lines.keys() - old.lines.keys()):
        yield name, "new", ""
    for name in sorted(old.lines.keys() & new.lines.keys()):
        if old.lines[name] != new.lines[name]:
            yield name, "changed", changes(old, new, name)


def changes(old: Table, new: Table, name: str) -> str:
    """Arguments of a function, or members of an enumeration, that were removed (-) and added (+)."""
    if name in new.enumerations:
        before, after = ([*table.enumerations[name]] for table in (old, new))
    else:
        before, after = (_words(table.functions[name]) for table in (old, new))
    gone = [f"-{word}" for word in before if word not in after]
    return " ".join(gone + [f"+{word}" for word in after if word not in before])


def _words(signature: Signature) -> list[str]:
    return [argument.name + ("=" if argument.optional else "") for argument in signature]


def lines(old: Table, new: Table, names: set[str]) -> Iterator[str]:
    """Rows of Markdown for some names."""
    for name, kind, what in differences(old, new):
        if name in names:
            yield f"| `{name}` | {kind} | {f'`{what}`' if what else ''} |"


def main(old: str, new: str) -> None:
    """Print everything that differs."""
    for name, kind, what in differences(read(old), read(new)):
        print(f"{kind:8} {name}  {what}".rstrip())


if __name__ == "__main__":
    main(*(sys.argv[1:] or (VERSIONS[0], VERSIONS[-1])))
