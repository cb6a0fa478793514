"""Make an installed CUDA build of torch usable without the 2.2 GB of CUDA libraries that it asks for.

    ENVIRONMENT/bin/python tests/next/stand_ins.py

For environments of tests on a machine without a GPU, and never for users: the package index has no CPU build of torch
for Python 3.12 and newer. torch's own libraries name functions of CUDA's libraries, which the dynamic linker wants to
find when torch is imported, and which nothing calls on a machine without a GPU. This script compiles, for each missing
library, one in which each of those functions prints its name and aborts the process. It needs gcc and readelf.

Then it takes the packages that are missing on purpose out of torch's list of requirements, so that pip neither
installs them nor complains.
"""

import re
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from sysconfig import get_path

# Only a function of cuda-runtime is called on a machine without a GPU: it says that there is none.
LEFT_OUT = re.compile(r"Requires-Dist: (cuda-|nvidia-)")
# The driver: torch itself loads it only where there is a device.
DRIVER = "libcuda.so.1"

BODY = """
#include <stdio.h>
#include <stdlib.h>
static void refuse(const char *name) {
    fprintf(stderr, "error: %s was called, and this environment has only a stand-in of %s\\n", name, LIBRARY);
    abort();
}
"""


def read(option: str, library: Path) -> str:
    """What readelf prints of one library."""
    command = ["readelf", "--wide", option, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed_libraries(library: Path) -> list[str]:
    """Names of the libraries that this one loads."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", read("--dynamic", library))


def symbols(library: Path) -> tuple[set[str], set[str]]:
    """Functions and data of a library: what it defines, and what it wants, as NAME or NAME@VERSION."""
    defined, wanted = set(), set()
    for line in read("--dyn-syms", library).splitlines():
        fields = line.split()
        if len(fields) < 8 or not fields[0].endswith(":") or fields[4] == "LOCAL":
            continue
        if fields[6] != "UND":
            defined.add(fields[7].partition("@")[0])
        elif fields[4] != "WEAK":
            wanted.add(fields[7])
    return defined, wanted


def version_owners(library: Path) -> dict[str, str]:
    """The library that each version name of a wanted symbol belongs to."""
    owners, owner = {}, ""
    for line in read("--version-info", library).splitlines():
        if file := re.search(r"File: (\S+)", line):
            owner = file[1]
        elif (name := re.search(r"Name: (\S+) +Flags: \S+ +Version:", line)) and owner:
            owners[name[1]] = owner
    return owners


def system_libraries() -> dict[str, Path]:
    """Where the dynamic linker finds the libraries of this machine, by name; without its CUDA, if it has one."""
    listed = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^\t(\S+) .* => (\S+)$", listed, re.MULTILINE)
    return {name: Path(path) for name, path in found if "/cuda" not in path}


def missing_symbols(libraries: list[Path], present: list[Path]) -> dict[str, dict[str, set[str]]]:
    """For each library that is missing: its functions by version name, "" for those without a version."""
    system = system_libraries()
    needed = {name for library in libraries for name in needed_libraries(library)} - {DRIVER}
    found = {path.name for path in libraries + present} | system.keys()
    missing: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in sorted(needed - found)}
    present = libraries + present + [system[name] for name in needed & system.keys()]
    defined = set().union(*(symbols(library)[0] for library in present))
    for library in libraries:
        owners = version_owners(library)
        # Any library without versions may hold the rest: the linker looks through all of them.
        unversioned = next((name for name in needed_libraries(library) if name in missing.keys() - owners.values()), "")
        for symbol in symbols(library)[1]:
            name, _, version = symbol.partition("@")
            owner = owners.get(version) if version else unversioned
            if owner in missing and (version or name not in defined):
                missing[owner][version].add(name)
    return missing


def compile_stand_in(name: str, functions: dict[str, set[str]], directory: Path) -> None:
    """Write a library of this name, whose functions abort, into a directory."""
    source = [f'#define LIBRARY "{name}"', BODY]
    script = []
    for version, wanted in sorted(functions.items()):
        source += [f'void {function}(void) {{ refuse("{function}"); }}' for function in sorted(wanted)]
        if version:
            script.append(f"{version} {{ global: {'; '.join(sorted(wanted))}; }};")
    options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(directory / name)]
    if script:
        versions = directory / f"{name}.versions"
        versions.write_text("\n".join(script))
        options.append(f"-Wl,--version-script={versions}")
    subprocess.run(["gcc", *options], input="\n".join(source), check=True, text=True)
    (directory / f"{name}.versions").unlink(missing_ok=True)


def drop_requirements() -> None:
    """Take the CUDA packages out of what the installed torch says it requires."""
    (path,) = [file for file in metadata.files("torch") if file.name == "METADATA"]
    lines = path.locate().read_text(encoding="utf-8").splitlines(keepends=True)
    path.locate().write_text("".join(line for line in lines if not LEFT_OUT.match(line)), encoding="utf-8")


def main() -> None:
    """Compile the stand-ins beside torch's own libraries."""
    packages = Path(get_path("purelib"))
    directory = packages / "torch" / "lib"
    if not (directory / "libtorch_cuda.so").exists():
        print("torch is a build without CUDA: nothing to do")
        return
    libraries = [path for path in sorted(directory.glob("lib*.so*")) if path.name != "libcaffe2_nvrtc.so"]
    missing = missing_symbols(libraries, sorted(packages.glob("nvidia/**/*.so*")))
    for name, functions in missing.items():
        compile_stand_in(name, functions, directory)
    drop_requirements()
    count = sum(len(wanted) for functions in missing.values() for wanted in functions.values())
    print(f"{len(missing)} stand-ins of CUDA libraries, {count} functions: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
