"""Run by torchrun: the command line, with files of a few kB; FAIL in the environment is a rank that has no disk left, AFTER the
steps that it still makes."""

from __future__ import annotations

import os

from fewbit import streaming
from fewbit.cli import main

streaming.FILE = 8_000
if os.environ.get("FAIL") == os.environ["RANK"]:
    left = iter(range(int(os.environ["AFTER"])))

    def no_space(*_: object) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")

    streaming.Job._check_memory = no_space  # type: ignore[method-assign]

main()
