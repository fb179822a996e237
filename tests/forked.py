"""Scripts in real processes that start at once."""

import atexit
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# On other systems, and with a GPU, PyTorch does not work in a copy of a process.
CAN_FORK = sys.platform == "linux" and not torch.cuda.is_available()
# Nor does it if the first backward pass comes after an export: to trace a model, an export pretends that there is a
# GPU, and autograd then starts threads for it.
torch.zeros(1, requires_grad=True).sum().backward()


class Started:
    """A script that runs in a process of its own, in this working directory, with these environment variables added.

    If possible, the process is a copy of this one, so it need not import PyTorch again, which takes seconds."""

    def __init__(self, path: Path, arguments: list[str], folder: Path, environment: dict[str, str]):
        self.output = tempfile.TemporaryDirectory()
        files = [Path(self.output.name, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        self.stdout, self.stderr = files
        if CAN_FORK:
            given = (path, arguments, folder, environment, files)
            self.process = multiprocessing.get_context("fork").Process(target=run_as_main, args=given)
            self.process.start()
        else:
            command = [sys.executable, path, *arguments]
            with open(self.stdout, "w") as stdout, open(self.stderr, "w") as stderr:
                self.process = subprocess.Popen(
                    command, cwd=folder, env=os.environ | environment, stdout=stdout, stderr=stderr
                )
        self.pid = self.process.pid
        atexit.register(self.process.kill)  # if a test fails before it ends

    @property
    def returncode(self) -> int | None:
        """None while the process is running."""
        return self.process.exitcode if CAN_FORK else self.process.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process, and wait for its end."""
        self.process.kill()
        self.ended()

    def ended(self, seconds: float = 300) -> subprocess.CompletedProcess:
        """The process at its end."""
        wait_for(lambda: self.returncode is not None, seconds)
        stdout, stderr = (file.read_text(errors="surrogateescape") for file in (self.stdout, self.stderr))
        return subprocess.CompletedProcess([], self.returncode, stdout, stderr)


def run_as_main(path: Path, arguments: list[str], folder: Path, environment: dict[str, str], output: list[Path]):
    """`python path arguments`, in the copy of a process. Its output goes to these two files."""
    gc.freeze()  # what the tests left behind is not for this process to clean up
    for descriptor, file in zip((1, 2), output, strict=True):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)  # the threads of the process that was copied do not exist here
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def start(path: object, *arguments: object, folder: Path = ROOT, **environment: str) -> Started:
    """A script in a process of its own; the path may be relative to the root of the project."""
    return Started(ROOT / str(path), [str(argument) for argument in arguments], folder, environment)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until the condition holds. Fails after this many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.02)
