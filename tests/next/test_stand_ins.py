"""Libraries that stand in for missing ones: they load, and a call of any function ends the process with its name."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.next.stand_ins import compile_stand_in, missing_symbols

pytestmark = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("readelf")), reason="gcc and readelf are not installed"
)
NAME = "libwanted.so.1"


def build(output: Path, source: str, *options: str) -> Path:
    command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-x", "none", *options, "-o", str(output)]
    subprocess.run(command, input=source, text=True, check=True, cwd=output.parent)
    return output


@pytest.mark.parametrize("version", ["WANTED_1", ""])
def test_a_missing_library_is_replaced(version, tmp_path):
    script = []
    if version:
        (tmp_path / "versions").write_text(f"{version} {{ global: wanted; }};")
        script = ["-Wl,--version-script=versions"]
    real = build(tmp_path / NAME, "void wanted(void) {}", f"-Wl,-soname,{NAME}", *script)
    source = "void wanted(void); int use(int call) { if (call) wanted(); return 7; }"
    user = build(tmp_path / "libuser.so", source, NAME, "-Wl,-rpath,$ORIGIN", "-Wl,-z,now")
    assert missing_symbols([user], [real]) == {}
    real.unlink()
    missing = missing_symbols([user], [])
    assert missing == {NAME: {version: {"wanted"}}}
    compile_stand_in(NAME, missing[NAME], tmp_path)
    program = f"import ctypes, sys; sys.exit(ctypes.CDLL({str(user)!r}).use(int(sys.argv[1])))"
    loaded, called = (
        subprocess.run([sys.executable, "-c", program, call], capture_output=True, text=True) for call in ("0", "1")
    )
    assert loaded.returncode == 7
    assert called.returncode == -signal.SIGABRT
    assert "error: wanted was called, and this environment has only a stand-in of libwanted.so.1" in called.stderr
