import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from kit import metrics


def brute_force_aupro(maps, masks, limit=0.3):
    """A loop over every distinct score as a threshold, and over every region."""
    regions = [
        (i, labels == k)
        for i, mask in enumerate(masks)
        for labels, n in [ndimage.label(mask, np.ones((3, 3)))]
        for k in range(1, n + 1)
    ]
    curve = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        hit = maps >= threshold
        curve.append(((hit & ~masks).sum() / (~masks).sum(), np.mean([hit[i][r].mean() for i, r in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x0 < limit:
            end = min(x1, limit)
            at_end = y1 if x1 == x0 else y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + at_end) / 2
    return area / limit


@pytest.mark.parametrize("levels", [5, 1000])
def test_pixel_metrics_equal_brute_force_and_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    masks = ndimage.binary_dilation(rng.random((3, 16, 16)) > 0.97, np.ones((1, 2, 2)))
    maps = (np.round((rng.random(masks.shape) + 0.4 * masks) * levels) / levels).astype(np.float32)
    found = metrics.pixel_metrics(maps, masks)
    assert found["aupro"] == pytest.approx(brute_force_aupro(maps, masks), abs=1e-6)
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)
    assert found["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-9)


def test_pixel_metrics_of_ties_alone_are_those_of_chance():
    masks = np.arange(32).reshape(2, 4, 4) % 5 == 0
    found = metrics.pixel_metrics(np.ones((2, 4, 4), np.float32), masks)
    assert found == pytest.approx({"pixel_auroc": 0.5, "pixel_ap": masks.mean(), "aupro": 0.15})


def test_aupro_by_hand():
    """Two regions of 1 and 3 pixels, and 10 normal pixels. Scores fall in this order: the small region, one normal
    pixel, the large region, the rest.

    Overlap is 0.5 up to FPR 0.1 and 1.0 from there on: (0.1 * 0.5 + 0.2 * 1) / 0.3.
    """
    mask = np.array([[1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]], dtype=bool)[None]
    maps = np.array([[9, 8, 0, 0, 0, 0, 0], [0, 0, 0, 0, 7, 6, 5]], dtype=np.float32)[None]
    assert metrics.pixel_metrics(maps, mask)["aupro"] == pytest.approx((0.1 * 0.5 + 0.2) / 0.3)
    assert metrics.pixel_metrics(mask.astype(np.float32), mask)["aupro"] == pytest.approx(1.0)


def test_aupro_counts_diagonal_neighbours_as_one_region():
    """There are two regions; one has two diagonal pixels. One of these has the highest score: half of one region of two
    is found at a false-positive rate of 0."""
    mask, maps = np.zeros((1, 4, 4), dtype=bool), np.ones((1, 4, 4), dtype=np.float32)
    mask[0, [0, 1, 3], [0, 1, 3]] = True
    maps[0, [0, 1, 3], [0, 1, 3]] = 9, 0, 0
    assert metrics.pixel_metrics(maps, mask)["aupro"] == pytest.approx(0.25)


def test_aupro_stops_where_a_false_positive_rate_falls_on_the_limit():
    """Three of ten normal pixels have the highest scores, then comes a region. So all overlap is gained at a
    false-positive rate of 0.3, where the area ends."""
    maps = np.array([3, 9, 8, 7, 0, 0, 0, 0, 0, 0, 0, 5], dtype=np.float32).reshape(1, 1, 12)
    mask = np.isin(np.arange(12), (0, 11)).reshape(1, 1, 12)
    assert metrics.pixel_metrics(maps, mask)["aupro"] == pytest.approx(0.0)


def test_metrics_are_none_where_undefined():
    empty, maps = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), np.float32)
    assert set(metrics.image_metrics(np.ones(4, bool), np.arange(4.0)).values()) == {None}
    assert set(metrics.pixel_metrics(maps, empty).values()) == {None}
    assert set(metrics.pixel_metrics(maps, ~empty).values()) == {None}


def test_image_metrics_by_hand():
    found = metrics.image_metrics(np.array([False, False, True, True]), np.array([0.1, 0.6, 0.4, 0.9]))
    assert found["image_auroc"] == pytest.approx(0.75)  # of four pairs one is the wrong way round
    assert found["image_f1max"] == pytest.approx(0.8)  # at 0.4: two found, one false alarm
    assert found["image_ap"] == pytest.approx((1 + 2 / 3) / 2)


def test_shares_at_a_threshold_by_hand():
    labels, scores = np.array([True, True, True, False, False]), np.array([0.9, 0.5, 0.2, 0.6, 0.1])
    found = metrics.shares_at(0.5, labels, scores)  # a score equal to the threshold is not above it
    assert found == pytest.approx({"recall": 1 / 3, "precision": 1 / 2, "false_alarms": 1 / 2})
    assert metrics.shares_at(1, labels[:3], scores[:3]) == {"recall": 0, "precision": None, "false_alarms": None}
