import argparse
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import NOWHERE, ROOT, script

from kit import InputError
from kit.command_line import check_range, evaluation_options, one_line, refuse_without_effect, run_script
from kit.processes import pick_device
from kit.settings import OPTIONS
from methods import METHODS


@pytest.mark.parametrize(
    "error, line",
    [
        (InputError("a.png: broken"), "a.png: broken"),
        (MemoryError(), "the memory is full"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the memory is full"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "the memory of the GPU is full; give --device cpu"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device; check the path"),
        (
            InputError("Caught InputError in a worker.\nTraceback ...\nkit.InputError: b.png: broken"),
            "b.png: broken",
        ),
    ],
)
def test_errors_become_one_line_and_exit_code_2(capsys, error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.startswith(f"error: {line}") and stderr.count("\n") == 1


def test_an_error_without_a_text_is_named_by_its_type():
    assert one_line(MemoryError()) == "MemoryError"  # the interpreter raises it without a text


def test_several_values_for_one_option_are_explained():
    """As when a shell replaces *.png by the names of the files."""
    with pytest.raises(InputError, match="unrecognized arguments: b.png; .* for several images give a folder"):
        evaluation_options(["run", "--images", "a.png", "b.png"])
    with pytest.raises(InputError, match="unrecognized arguments: --image-size$"):
        evaluation_options(["run", "--image-size"])


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_script(lambda: {}["missing"])


def test_bad_input_is_one_line_in_a_real_process(request, real_processes):
    process = real_processes[request.node.name]
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2 and stderr == f"error: --data {NOWHERE}: no such folder\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("before", ["", "run_script(lambda: None);"])
def test_a_signal_outside_of_a_script_leaves_no_traceback(number, before):
    """While PyTorch is imported, and after the script has ended."""
    start = "import time; from kit.command_line import quit_on_signals, run_script; quit_on_signals()"
    code = f"{start}; {before} print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert "".join(process.communicate(timeout=60)) == "" and process.returncode == 128 + number


def test_options():
    args = argparse.Namespace(keep_epochs=None, lr=None, size=0)
    refuse_without_effect(args, ["keep_epochs", "lr"], "here")
    with pytest.raises(InputError, match="--keep-epochs has no effect here"):
        refuse_without_effect(argparse.Namespace(keep_epochs=True), ["keep_epochs"], "here")
    with pytest.raises(InputError, match="--size 0: out of range"):
        check_range("size", args.size, 64, 4096)
    assert pick_device("cpu", local_rank=0) == "cpu"
    with pytest.raises(InputError, match="--device x"):
        pick_device("x", local_rank=0)
    with pytest.raises(InputError, match="one process for each GPU"):
        pick_device("cuda", local_rank=77)


@pytest.mark.parametrize(
    "name, flag, wrong", [("train.py", "--weights", ["--bank", 3]), ("evaluate.py", "--explain", ["runs", "--watch"])]
)
def test_a_command_line_is_read_without_pytorch(tmp_path, name, flag, wrong):
    """Importing PyTorch takes seconds: --help and errors in the command line do not wait for it."""
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = script(name, "--help", env=environment)
    assert result.returncode == 0 and flag in result.stdout and not result.stderr
    result = script(name, *wrong, env=environment)
    assert result.returncode == 2 and result.stderr.startswith("error: --"), result.stderr


def test_the_two_tables_of_methods_agree():
    assert OPTIONS.keys() == METHODS.keys()
    assert all(OPTIONS[name].settings is method.detector.SETTINGS for name, method in METHODS.items())


def test_a_closed_pipe_ends_a_script_in_silence():
    lines = "[print('line', flush=True) for _ in range(10**6)]"
    code = f"from kit.command_line import run_script; run_script(lambda: {lines})"
    command = f'{sys.executable} -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("line\n", "", 141)
