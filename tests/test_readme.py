import code
import re

import torch
from helpers import ROOT
from PIL import Image


def test_readme_draws_two_moons(tmp_path, monkeypatch, capsys):
    """The toy example, pasted into the Python prompt as the README shows it. There, unlike in a script, blank lines end
    a block."""
    (toy,) = re.findall(r"^```python\n(import torch\n.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    prompt = code.InteractiveConsole()
    for line in f"{toy}print(loss.item())".splitlines():
        prompt.push(line)
    done = capsys.readouterr()
    assert "Error" not in done.err, done.err
    assert float(done.out) < 0  # 0.5 or more before the first step
    assert Image.open(tmp_path / "moons.png").size == (320, 320)
