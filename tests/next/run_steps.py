"""Train some steps in the Python that runs this, which may be another environment's than the test's.

python -m tests.next.run_steps '{"load": "...", "save": "...", "data": {"el": "...", ...}, "changes": {...}}'
"""

import json
import sys
from pathlib import Path

from megatron_moe_lpr.platform import select_platform
from tests.training.runs import train


def main(given: str) -> None:
    arguments = json.loads(given)
    select_platform("cpu")
    train(Path(arguments["load"]), Path(arguments["save"]), arguments["data"], **arguments["changes"])


if __name__ == "__main__":
    main(sys.argv[1])
