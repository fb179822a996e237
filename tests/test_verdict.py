import numpy as np
import pytest

from kit.verdict import Thresholds, judge, threshold, thresholds


def test_threshold_is_an_order_statistic():
    values = np.linspace(0.1, 0.5, 99)
    assert threshold(values, 0.05) == (values[-5], False)  # the fifth of 100
    assert threshold(values[::-1], 0.01) == (0.5, False)
    both = thresholds(np.stack([values, 1 - values]), 0.05)
    assert (both.score, both.heat, both.extrapolated) == (values[-5], pytest.approx(0.9 - 4 * 0.4 / 98), False)


def test_threshold_of_few_images_is_students_bound():
    """Twelve to calibrate on and one to test, many times over: the thirteenth exceeds it as often as promised."""
    rng, rate = np.random.default_rng(0), 0.02
    trials = rng.normal(2.0, 0.3, (4000, 13))
    limits = [threshold(row[:12], rate)[0] for row in trials]
    assert np.mean(trials[:, 12] > limits) == pytest.approx(rate, abs=0.007)
    assert threshold(trials[0, :12], rate)[1]


def test_threshold_of_one_image_is_its_value_and_never_below_the_highest():
    assert threshold(np.array([0.3]), 0.02) == (0.3, True)
    assert threshold(np.array([0.3] * 9 + [5.0]), 0.05)[0] == 5.0


def test_verdict_lists_all_regions_highest_peak_first():
    heat = np.zeros((40, 60), dtype=np.float32)
    heat[5:10, 20:30], heat[30:33, 50:52] = 0.8, 0.9
    verdict = judge(0.7, heat, Thresholds(score=0.6, heat=0.5, extrapolated=False))
    assert verdict.anomalous and verdict.found.sum() == 56
    assert [(r.box, r.area, r.peak) for r in verdict.regions] == [
        ((50, 30, 52, 33), 6, pytest.approx(0.9)),
        ((20, 5, 30, 10), 50, pytest.approx(0.8)),
    ]


def test_anomalous_image_below_the_heat_limit_shows_where_it_is_highest():
    heat = np.zeros((40, 60), dtype=np.float32)
    heat[30:33, 50:52] = 0.4
    assert judge(0.7, heat, Thresholds(0.6, 0.5, False)).regions[0].box == (50, 30, 52, 33)


def test_normal_image_has_no_regions():
    verdict = judge(0.6, np.ones((4, 4), np.float32), Thresholds(0.6, 0.5, False))
    assert not verdict.anomalous and not verdict.regions and not verdict.found.any()
