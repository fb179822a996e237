"""How training keeps up on a busy machine: its rate on the demo, alone and beside one busy process per core.

python benchmarks/load.py    # some two minutes"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUSY = [sys.executable, "-c", "while True: pass"]


def steps_per_second(out: str) -> float:
    """The rate of the second of two epochs on the demo; the first one also fills caches."""
    command = [sys.executable, "train.py", "--epochs", "2", "--out", out]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    last_row = Path(out, "log.csv").read_text().splitlines()[-1]
    return float(last_row.split(",")[-1])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        alone = steps_per_second(f"{folder}/alone")
        others = [subprocess.Popen(BUSY) for _ in range(os.cpu_count() or 1)]
        try:
            beside = steps_per_second(f"{folder}/beside")
        finally:
            for process in others:
                process.kill()
    print(f"steps per second: alone {alone:.1f}, beside one busy process per core {beside:.1f}")
    print(f"share kept: {beside / alone:.2f}")


if __name__ == "__main__":
    main()
