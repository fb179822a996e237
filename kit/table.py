"""The table over categories and seeds."""

import math

import numpy as np

COLUMNS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro", "recall", "false_alarms")


def results_table(rows: list[dict]) -> str:
    """Markdown: mean ± standard deviation over the seeds for each category, then the mean of the categories; `rows`
    are the metrics.json of all runs. What is undefined in one of them is n/a."""
    lines = [["category", "seeds", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    means = []
    for category in dict.fromkeys(row["category"] for row in rows):
        runs = [row for row in rows if row["category"] == category]
        values = np.array([[row[name] for name in COLUMNS] for row in runs], dtype=float)  # None becomes nan
        mean = values.mean(axis=0)
        spread = values.std(axis=0, ddof=1) if len(runs) > 1 else [None] * len(COLUMNS)
        lines.append([category, str(len(runs)), *map(cell, mean, spread)])
        means.append(mean)
    lines.append(["mean", "", *map(cell, np.mean(means, axis=0), [None] * len(COLUMNS))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(mean: float, spread: float | None) -> str:
    if math.isnan(mean):
        return "n/a"
    return f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"
