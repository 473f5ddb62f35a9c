"""`llava-npu train`, in a process that is killed after some steps: python dying_node.py STEPS CONFIG"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from llava_npu.cli import app, run
from llava_npu.training.nonfinite.guard import NonFiniteGuard

if __name__ == "__main__":
    last, config = int(sys.argv[1]), sys.argv[2]
    add = NonFiniteGuard.add

    def add_or_die(guard: NonFiniteGuard, step: int, norm: Any) -> None:
        add(guard, step, norm)
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    NonFiniteGuard.add = add_or_die  # type: ignore[method-assign]
    sys.argv[1:] = ["train", config]
    run(app)
