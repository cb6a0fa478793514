"""What the extension of one version of Transformer Engine has and that of another has not: the table in docs/gpu.md.

    python -m tests.emulation.differences [OLD NEW]

In full, with types, it is `diff tests/emulation/tables/OLD.txt tests/emulation/tables/NEW.txt`.
"""

import sys
import textwrap
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


def markdown(old: Table, new: Table) -> str:
    """A row for each name that changed, and lists of those that only one version has."""
    rows = [f"| | {old.version} to {new.version}: - removed, + added, `=` has a default |", "|---|---|"]
    rows += [f"| `{name}` | {_as_code(what)} |" for name, kind, what in differences(old, new) if kind == "changed"]
    parts = ["\n".join(rows)]
    for kind, table in (("gone", old), ("new", new)):
        names = [f"`{name}`" for name, found, _ in differences(old, new) if found == kind]
        listed = ", ".join(names) if names else "nothing"
        parts.append(textwrap.fill(f"Only {table.version} has: {listed}.", 120, break_on_hyphens=False))
    return "\n\n".join(parts) + "\n"


def _as_code(words: str) -> str:
    return " ".join(f"`{word}`" for word in words.split())


if __name__ == "__main__":
    print(markdown(*(read(version) for version in sys.argv[1:] or (VERSIONS[0], VERSIONS[-1]))), end="")
