"""benchmarks/ablation.py --compare: categories are the sample, not seeds."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ablation import compare


def test_categories_are_compared_each_by_its_mean_over_seeds(tmp_path, capsys):
    gains = {"one": (0.01, 0.03), "two": (0.02, 0.02), "three": (0.05, 0.07)}  # means .02, .02, .06
    for name, of_seeds in gains.items():
        rows = []
        for seed, gain in enumerate(of_seeds):
            rows.append({"variant": "before", "seed": seed, "image_auroc": 0.9})
            rows.append({"variant": "after", "seed": seed, "image_auroc": 0.9 + gain})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare([Path(name) for name in gains], tmp_path, "before", "after")
    said = capsys.readouterr().out
    means = np.array([0.02, 0.02, 0.06])
    t = means.mean() / (means.std(ddof=1) / np.sqrt(3))
    assert "over 3 categories" in said and f"t = {t:.2f}, p = 0.130" in said
    assert float(said.split("gain ")[1].split()[0]) == pytest.approx(means.mean(), abs=1e-4)
