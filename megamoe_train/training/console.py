"""Two streams per rank: the console, for what a user should read, and a log, for everything else that is printed.

Megatron, torch and their libraries write thousands of lines to stdout and stderr. `Console` moves both (also what C++
writes) to a file and keeps the way to the terminal for itself. The file has no name until the checks have passed.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from tqdm import tqdm


class Console:
    """What this rank says to its user, and where the rest goes."""

    def __init__(self, *, verbose: bool = False) -> None:
        self.log_path: Path | None = None
        self.stream: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        self.is_terminal = self.stream.isatty()
        self._bar: tqdm | None = None
        self._early = None
        if not verbose:
            self._early = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - open as long as the process
            _redirect(self._early.fileno())

    def open_log(self, path: Path) -> None:
        """From now on the log is `path`, appended to; what was printed so far comes first."""
        if self._early is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        with path.open("ab") as log:
            self._early.seek(0)
            shutil.copyfileobj(self._early, log)
            log.flush()
            _redirect(log.fileno())
        self.log_path = path

    def say(self, text: str) -> None:
        """A line for the user, above the progress bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            self.stream.write(text + "\n")

    def progress(self, step: int, last: int, text: str) -> None:
        """Where the job is: the bar on a terminal, nothing in a log (which gets whole lines through `say`)."""
        if not self.is_terminal:
            return
        if self._bar is None:
            form = "{percentage:3.0f}% |{bar:16}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            known = os.get_terminal_size(self.stream.fileno()).columns > 0
            width = {"dynamic_ncols": True} if known else {"ncols": 120}
            self._bar = tqdm(total=last, initial=step, file=self.stream, bar_format=form, **width)
        self._bar.set_postfix_str(text, refresh=step == self._bar.initial)
        self._bar.update(step - self._bar.n)

    def end_progress(self) -> None:
        """Leave the bar where it is and go on below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _redirect(descriptor: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for standard in (1, 2):
        os.dup2(descriptor, standard)
