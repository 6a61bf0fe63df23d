"""`pift launch` for the tests that kill it: the same launch, with trials that take their time between steps.

    python -m tests.chaos_driver SECONDS OVERRIDE ...      SECONDS: slept after every gradient step
    python -m tests.chaos_driver twice FOLDER COUNT OVERRIDE ...
                          one launch into each of the stores FOLDER/0, FOLDER/1, ..., each begun as soon as another
                          process is ready to launch into the same one; the exit codes on stdout

The trials are real ones (workers/run.py): the sleep only makes room for a kill.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAUSE = "PIFT_CHAOS_PAUSE"
TARGET = f"{__name__ if __name__ != '__main__' else 'tests.chaos_driver'}.run_trial"


def run_trial(*args: Any, should_stop: Callable[[], bool], **settings: Any) -> Any:
    """workers.run.run_trial with a pause after every step."""
    from workers.run import run_trial as real

    def paused() -> bool:
        time.sleep(float(os.environ.get(PAUSE, "0")))
        return should_stop()

    return real(*args, should_stop=paused, **settings)


def main() -> int:
    from orchestrator.errors import UserError
    from orchestrator.grid import compose
    from orchestrator.launch import launch

    if sys.argv[1] == "twice":
        return twice(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    os.environ[PAUSE] = sys.argv[1]
    try:
        return launch(compose(sys.argv[2:]), json_output=True, target=TARGET)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def twice(folder: Path, count: int, overrides: list[str]) -> int:
    """See the module."""
    from orchestrator.grid import compose
    from orchestrator.launch import launch

    codes = []
    for number in range(count):
        plan = compose([*overrides, f"store={folder / str(number)}"])
        ready = folder / f"ready.{number}"
        ready.mkdir(exist_ok=True)
        (ready / str(os.getpid())).touch()
        while len(list(ready.iterdir())) < 2:
            time.sleep(0.001)
        with contextlib.redirect_stdout(sys.stderr):
            codes.append(launch(plan, target=TARGET))
    print(codes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
