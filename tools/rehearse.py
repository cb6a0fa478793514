#!/usr/bin/env python3
"""The command `moe-lpr rehearse` as a script of a clone."""

from megatron_moe_lpr.commands.rehearse import main
from megatron_moe_lpr.errors import run_command

if __name__ == "__main__":
    run_command(main)
