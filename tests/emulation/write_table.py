"""Reads from Transformer Engine's C++ sources what its compiled extension has: the tables in tests/emulation/tables.

    python -m tests.emulation.write_table DIRECTORY > tests/emulation/tables/2.20.2.txt

DIRECTORY is the unpacked source distribution of transformer_engine_torch. A line is a function with its arguments,
their types and defaults (all before `/` are given by position alone), an enumeration with its members, or a class.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

TYPES = {
    "at::Tensor": "Tensor",
    "torch::Tensor": "Tensor",
    "std::string": "str",
    "size_t": "int",
    "int64_t": "int",
    "uint64_t": "int",
    "uintptr_t": "int",
    "int": "int",
    "float": "float",
    "double": "float",
    "bool": "bool",
    "py::handle": "object",
    "handle": "object",
    "py::object": "object",
    "pybind11::object": "object",
    "MaybeTensor": "Tensor | None",
    "long": "int",
    "at::ScalarType": "torch.dtype",
    "c10::ScalarType": "torch.dtype",
    "c10::Device": "torch.device",
    "at::Device": "torch.device",
    "at::Generator": "torch.Generator",
    "torch::Device": "torch.device",
}
DEFAULTS = {"py::none()": "None", "nullptr": "None", "std::nullopt": "None", "true": "True", "false": "False"}
NAMESPACE = re.compile(r"\b(transformer_engine::pytorch|transformer_engine|std|pybind11)::(?=[A-Z])")


def table(root: Path) -> list[str]:
    """Lines of the table, sorted by name."""
    sources = [next(root.rglob("pybind_helper.h")), *sorted(root.rglob("csrc/extensions/*.cpp"))]
    declared = {name: arguments for path in _headers(root) for name, arguments in _declarations(_text(path))}
    values = {name: members for path in sorted(root.rglob("*.h")) for name, members in _enumerators(_text(path))}
    lines = set()
    for text in map(_text, sources):
        lines |= set(_functions(text, declared)) | set(_enumerations(text, values)) | set(_classes(text))
    return sorted(lines)


def _headers(root: Path) -> list[Path]:
    """Those of the extension last: its declarations count where the library beneath has the same name."""
    library = sorted(root.rglob("common_headers/**/*.h"))
    return [*library, *sorted(root.rglob("csrc/extensions/*.cpp")), next(root.rglob("csrc/extensions.h"))]


def _text(path: Path) -> str:
    """Without comments, preprocessor lines and continuation marks, on one line."""
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.DOTALL)
    text = re.sub(r"(?<!:)//[^\n]*", " ", text).replace("\\\n", "\n")
    return re.sub(r"\s+", " ", re.sub(r"(?m)^\s*#(?!define NVTE_DECLARE)[^\n]*", " ", text))


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`, strings skipped."""
    depth, quoted = 0, False
    for index in range(start, len(text)):
        character = text[index]
        if character == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif not quoted and character in "([{":
            depth += 1
        elif not quoted and character in ")]}":
            depth -= 1
            if not depth:
                return index
    raise ValueError(f"no closing bracket after {text[start : start + 80]}")


def _split(text: str) -> list[str]:
    """Parts between the commas outside of brackets and strings."""
    parts, depth, quoted = [""], 0, False
    for index, character in enumerate(text):
        if character == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif not quoted and (character in "([{" or (character == "<" and text[index + 1] != "<")):
            depth += 1
        elif not quoted and (character in ")]}" or (character == ">" and text[index - 1] != "-")):
            depth -= 1
        if character == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _declarations(text: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Every function of a header with the types and names of its arguments."""
    for match in re.finditer(r"[\w>&*] (\w+)\(", text):
        end = _closing(text, match.end() - 1)
        if re.match(r"\s*(const)?\s*[;{]", text[end + 1 : end + 10]):
            yield match[1], [_argument(part) for part in _split(text[match.end() : end])]


def _argument(text: str) -> tuple[str, str]:
    declared = text.split("=")[0].strip()
    kind, _, name = declared.rpartition(" ")
    return _type(kind), name.lstrip("&*").rstrip("_")


def _type(kind: str) -> str:
    kind = NAMESPACE.sub("", re.sub(r"\bconst\b|[&*]", "", kind).strip())
    inner = re.fullmatch(r"(?:std|c10|at)::(optional|vector|tuple|pair)< ?(.*?) ?>", kind)
    if inner is None:
        return TYPES.get(kind, kind)
    parts = [_type(part) for part in _split(inner[2])]
    if inner[1] == "optional":
        return parts[0] if parts[0].endswith("| None") else f"{parts[0]} | None"
    return f"list[{parts[0]}]" if inner[1] == "vector" else f"tuple[{', '.join(parts)}]"


def _functions(text: str, declared: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    for match in re.finditer(r"\b(m|grouped_mlp_experimental)\.def\(", text):
        name, function, *rest = _split(text[match.end() : _closing(text, match.end() - 1)])
        name = name.strip('"') if match[1] == "m" else f"{match[1]}.{name.strip(chr(34))}"
        given = [part for part in rest if part.startswith(("py::arg(", "py::kw_only("))]
        types = declared.get(function.split("::")[-1].lstrip("&"))
        yield f"{name}({', '.join(_parameters(given, types))})"


def _parameters(given: list[str], types: list[tuple[str, str]] | None) -> Iterator[str]:
    if given:
        kinds = iter([kind for kind, _ in types] if types is not None else [])
        for part in given:
            if part.startswith("py::kw_only"):
                yield "*"
                continue
            name, default = re.fullmatch(r'py::arg\("(\w+)"\)(?: = (.*))?', part).groups()
            yield f"{name}: {next(kinds, 'object')}" + (f" = {_default(default)}" if default else "")
    elif types:
        yield from (f"{name}: {kind}" for kind, name in types)
        yield "/"


def _default(text: str) -> str:
    number = re.fullmatch(r"(-?[\d.]+)f?", text)
    return number[1] if number else DEFAULTS.get(text, "...")


def _enumerators(text: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Every enumeration of a header with the values of its members."""
    for match in re.finditer(r"enum (?:class )?(\w*) ?\{([^}]*)\} ?(\w*);", text):
        members, value = {}, -1
        for part in _split(match[2]):
            name, _, given = part.partition("=")
            value = int(given, 0) if re.fullmatch(r" ?-?\w+", given) and given.strip("- ")[0].isdigit() else value + 1
            members[name.strip()] = value
        yield match[1] or match[3], members


def _enumerations(text: str, values: dict[str, dict[str, int]]) -> Iterator[str]:
    """Enumerations that Python sees: each member has the value of the C++ enumerator that it stands for."""
    for match in re.finditer(r'enum_<([^>]*)>\( ?m, "(\w+)"', text):
        members = re.findall(r'\.value\( ?"(\w+)", ([\w:]+)\)', text[match.end() : text.index(";", match.end())])
        known = values[match[1].split("::")[-1].strip()]
        pairs = (f"{name}={known[enumerator.split('::')[-1]]}" for name, enumerator in members)
        yield f"enum {match[2]}: {' '.join(pairs)}"


def _classes(text: str) -> Iterator[str]:
    for match in re.finditer(r'class_<[^(]*>\( ?m, "(\w+)"', text):
        yield f"class {match[1]}"


if __name__ == "__main__":
    print("\n".join(table(Path(sys.argv[1]))))
