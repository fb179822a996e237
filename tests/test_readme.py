import re
import subprocess
import sys

from helpers import ROOT
from PIL import Image


def test_readme_draws_two_moons(tmp_path):
    """The toy example, pasted into the Python prompt as the README shows it. There, unlike in a script, blank lines end
    a block."""
    (toy,) = re.findall(r"^```python\n(import torch\n.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    pasted = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{toy}print(loss.item())\n"
    done = subprocess.run(
        [sys.executable, "-i", "-q"], input=pasted, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "Error" not in done.stderr, done.stderr
    assert float(done.stdout) < 0  # 0.5 or more before the first step
    assert Image.open(tmp_path / "moons.png").size == (320, 320)
