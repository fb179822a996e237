import code
import pkgutil
import re
import shutil

import pytest
import torch
from helpers import ROOT
from PIL import Image

from kit import folders
from kit.settings import CLFlowSettings


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


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_the_example_of_a_page_judges_an_image(finished_run, category, tmp_path, monkeypatch, capsys, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(from methods import load\n.*?)^```$", text, re.M | re.S)
    for name in ("good", "bottle"):
        shutil.copytree(finished_run, tmp_path / "runs" / name)
    chip = folders.list_images(category / "test" / "chip")[0]
    Image.open(chip).save(tmp_path / "part.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert "True" in capsys.readouterr().out and names["verdict"].anomalous
    if "detector" in names:  # the page goes on with this line
        assert "`detector.inspect(image, false_alarm=0.01)`" in text
        often = names["detector"].inspect("part.jpg", false_alarm=0.3)
        assert often.score == names["verdict"].score and often.threshold < names["verdict"].threshold


@pytest.mark.parametrize("page, least", [("method.md", 40), ("fork.md", 10), ("usage.md", 2)])
def test_names_in_the_docs_exist(page, least):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    modules = "clflow|bank|flows|synth|kit|methods|train|evaluate"
    names = [name for name in re.findall(rf"`((?:{modules})\.[\w.]+)", text) if not name.endswith(".py")]
    assert len(names) >= least
    for name in names:
        pkgutil.resolve_name(name)  # raises an error if it does not exist


def test_the_defaults_in_the_docs_are_those_of_the_settings():
    usage = " ".join((ROOT / "docs" / "usage.md").read_text(encoding="utf-8").split())
    (steps,) = re.findall(r"^STEPS_PER_EPOCH = (\d+)$", (ROOT / "clflow.py").read_text(), re.M)  # tests change it
    default = CLFlowSettings(images=50, held_out=8)
    assert default.classification_weight == default.contrast_weight
    expected = (
        f"*Defaults of CL-Flow:* `{default.backbone}`, {default.size} × {default.size} pixels, "
        f"{default.epochs} epochs of {steps} steps, batches of {default.batch:,} rows, learning rate {default.lr}, "
        f"{default.bank:,} prototypes, {default.steps} flow steps, both loss weights {default.contrast_weight:g}, "
        f"smoothing {default.smoothing}, temperature {default.temperature:g}, "
        f"accepted false alarms {100 * default.false_alarm:g} %, seed {default.seed} "
    )
    assert expected in usage
