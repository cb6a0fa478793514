"""Which errors end in one line, and which keep their traceback."""

import errno
import subprocess
import sys

import pytest
from torch.distributed.checkpoint import CheckpointException

from megatron_moe_lpr.errors import UserError, explain, name_file_in_oserror, run_command


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("a\nb\x1b[2J"), "error: a b [2J"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.bin"), "error: x.bin: No such file"),
        (
            CheckpointException("write", {1: (OSError(errno.ENOSPC, "No space left on device"), None)}),
            "error: checkpoint: No space left on device",
        ),
    ],
)
def test_the_users_and_the_machines_errors_are_one_line(error, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(raising(error))
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith(words) and line.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError("ours"), CheckpointException("write", {0: (TypeError("ours"), None)})])
def test_defects_keep_their_traceback(error):
    assert explain(error) is None
    with pytest.raises(type(error)):
        run_command(raising(error))


def test_interrupts_have_their_code(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(raising(KeyboardInterrupt()))
    assert (stop.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_a_write_gets_the_name_of_its_file():
    with pytest.raises(OSError) as caught, name_file_in_oserror("out.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert explain(caught.value).startswith("out.json: No space left on device")


def test_nobody_reads_the_output():
    """The command prints more than a pipe holds, and the reader closes it, as in `tool | head -1`."""
    code = "from megatron_moe_lpr.errors import run_command\nrun_command(lambda: print('x' * 10_000_000))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=120)) == (b"", 141)
