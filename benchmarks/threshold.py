"""Does the threshold keep its promise?  For trained runs of categories with test/: some of the good images' scores are
drawn, the threshold is set from them, and the test images that it flags are counted. An earlier rule and an oracle are
measured in the same way.

python benchmarks/threshold.py runs/bottle runs/screw"""

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from kit.files import checkpoint_of  # noqa: E402
from kit.measuring import judge_tests, readable_tests  # noqa: E402
from kit.processes import ALONE  # noqa: E402
from kit.verdict import threshold  # noqa: E402
from methods import load  # noqa: E402

COUNTS = (10, 20, 50, 100, 200)
RATES = (0.02, 0.05, 0.1)


def threshold_before(values: np.ndarray, rate: float) -> float:
    """The earlier rule: the k-th highest score, k = rate (n + 1) rounded down. If k is 0, Student's bound, but at least
    the highest score."""
    n = len(values)
    k = int(rate * (n + 1))
    if k > 0:
        return float(np.sort(values)[-k])
    bound = values.mean() + stats.t.ppf(1 - rate, n - 1) * np.sqrt(1 + 1 / n) * values.std(ddof=1)
    return float(max(values.max(), bound))


def oracle_recall(good: np.ndarray, bad: np.ndarray, false_alarms: float) -> float:
    """The highest recall of any threshold, chosen on the test labels, with false alarms at most these."""
    candidates = np.concatenate(([-np.inf], good, bad))
    return max((bad > limit).mean() for limit in candidates if (good > limit).mean() <= false_alarms)


def line(text: str, found: list[tuple[float, float, float]], rate: float) -> None:
    """Print means over several choices: false alarms, share of choices with more than twice the rate, recall, and the
    oracle's recall."""
    alarms, recall, oracle = np.array(found).T
    print(
        f"{text}: false alarms {alarms.mean():.3f} (above twice the rate: {(alarms > 2 * rate).mean():.0%}), "
        f"recall {recall.mean():.3f}, oracle {oracle.mean():.3f}",
        flush=True,
    )


def realised(limit: float, good: np.ndarray, bad: np.ndarray, rate: float) -> tuple[float, float, float]:
    """False alarms and recall of a threshold, and the oracle's recall at max(those false alarms, rate)."""
    alarms = float((good > limit).mean())
    return alarms, float((bad > limit).mean()), oracle_recall(good, bad, max(alarms, rate))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="run folders")
    add("--choices", type=int, default=10, help="number of random choices of the calibration images (default: 10)")
    add("--device", default="cpu")
    args = parser.parse_args()
    for run in args.runs:
        model = load(checkpoint_of(run), args.device)
        judged = judge_tests(model, readable_tests(Path(model.settings.data), skip_bad=False), ALONE)
        good, bad = judged.scores[~judged.labels], judged.scores[judged.labels]
        calibrating = model.good_scores[0].cpu().numpy()
        rng = np.random.default_rng(0)
        for rate in RATES:
            line(
                f"{run}, rate {rate}, all {len(calibrating)}",
                [realised(threshold(calibrating, rate), good, bad, rate)],
                rate,
            )
            for count in COUNTS:
                if count >= len(calibrating):
                    continue
                choices = [rng.choice(calibrating, count, replace=False) for _ in range(args.choices)]
                for name, rule in (("before", threshold_before), ("now", threshold)):
                    found = [realised(rule(choice, rate), good, bad, rate) for choice in choices]
                    line(f"{run}, rate {rate}, {count} images, {name}", found, rate)


if __name__ == "__main__":
    main()
