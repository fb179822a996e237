import numpy as np
import pytest
from scipy import stats

from kit import InputError
from kit.inspection import drift
from kit.settings import LEAST_IMAGES
from kit.verdict import CLIPPED_AT, CLIPPED_DEVIATION, Thresholds, allowance, decide, outliers, threshold, thresholds


def test_threshold_of_many_images_is_an_order_statistic():
    values = np.linspace(0.1, 0.5, 199)
    assert threshold(values, 0.05) == values[-10]  # the tenth of 200
    assert threshold(values[::-1], 0.1) == values[-20]


def test_threshold_of_few_images_is_exceeded_as_often_as_promised():
    """Twelve scores to calibrate on and one to test, many times. Their scatter is usual, narrower or wider."""
    rng, rate = np.random.default_rng(0), 0.02
    for scatter, above in ((0.16, 0.02), (0.1, 0.005), (0.2, 0.035)):
        trials = np.exp(rng.normal(0.5, scatter, (4000, 13)))
        limits = [threshold(row[:12], rate) for row in trials]
        assert np.mean(trials[:, 12] > limits) == pytest.approx(above, abs=0.01)


def test_threshold_by_hand():
    """Five values; the last one is far away. It counts as if it lay 1.5 deviations from the median, which is 0.3."""
    values = np.exp([0.1, 0.2, 0.3, 0.4, 0.9])
    usual = 0.16**2
    first_guess = np.sqrt((20 * usual + 5 * (0.1 / 0.67449) ** 2) / 25)  # the median distance from the median is 0.1
    low, high = 0.3 - 1.5 * first_guess, 0.3 + 1.5 * first_guess
    clipped = [max(v, low) if v < 0.3 else min(v, high) for v in (0.1, 0.2, 0.3, 0.4, 0.9)]
    normal = np.clip(np.random.default_rng(0).normal(size=1_000_000), -1.5, 1.5)
    variance = np.var(clipped, ddof=1) / normal.var()
    deviation = np.sqrt((20 * usual + 5 * variance) / 25)
    expected = np.mean(clipped) + stats.t.ppf(0.98, 24) * np.sqrt(1 + 1 / 5) * deviation
    assert np.log(threshold(values, 0.02)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("different", [20, 499])
def test_a_series_of_many_images_has_no_order_statistic(different):
    """600 scores count as fewer different images. Their logarithms are 0, or 0.1 above or below: none is clipped."""
    logs = np.repeat([-0.1, 0.0, 0.1], 200)
    assert threshold(np.exp(logs), 0.02) == np.exp(0.1)  # the twelfth highest, if all are different
    deviation = np.std(logs, ddof=1) / CLIPPED_DEVIATION
    pooled = np.sqrt((20 * 0.16**2 + different * deviation**2) / (20 + different))
    expected = stats.t.ppf(0.98, different - 1 + 20) * np.sqrt(1 + 1 / different) * pooled
    assert np.log(threshold(np.exp(logs), 0.02, different)) == pytest.approx(expected)


def test_too_few_scores_give_no_threshold():
    values = np.linspace(0.3, 0.4, LEAST_IMAGES)
    assert threshold(values, 0.02) > values.max()
    for call in (
        lambda: threshold(values[1:], 0.02),
        lambda: threshold(np.array([0.3]), 0.5),
        lambda: thresholds(np.stack((values, values)), 0.02, different=LEAST_IMAGES - 1),
    ):
        with pytest.raises(InputError, match="a threshold needs the scores of 5 different good images"):
            call()


@pytest.mark.parametrize("images, share", [(10, 0.45), (20, 0.2), (40, 0.12), (60, 0.1), (250, 0.05)])
def test_no_single_score_decides(images, share):
    """Any score is replaced by any value, also by one without a logarithm. `share` is how far this may move the
    threshold, relative to its distance from the median. With an earlier rule, one 0 among 60 scores moved it from 1.35
    to 34.6."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = np.exp(rng.normal(0, 0.16, images))
        limit = threshold(values, 0.02)
        for number in rng.permutation(images)[:10]:
            for other in (-3, 0, 0.02, 0.5, 0.8, 1, 1.2, 1.5, 2, 9, 1e6):
                changed = values.copy()
                changed[number] = other
                assert abs(threshold(changed, 0.02) - limit) < share * (limit - np.median(values)), (number, other)


def test_images_that_show_few_different_ones_support_less():
    values = np.exp(np.random.default_rng(0).normal(0, 0.16, 90))
    both = np.stack((values, values))
    as_they_are, few = thresholds(both, 0.02), thresholds(both, 0.02, different=12)
    assert (as_they_are.images, few.images) == (90, 12)
    assert few.score > as_they_are.score and few.at_most > 2 * as_they_are.at_most


@pytest.mark.parametrize("images", [20, 60, 300])
def test_a_mislabelled_image_does_not_decide(images):
    values = np.exp(np.random.default_rng(1).normal(0, 0.15, images))
    limit = threshold(values, 0.02)
    assert not len(outliers(values))
    values[7] = 9
    assert outliers(values).tolist() == [7]
    assert abs(threshold(values, 0.02) - limit) < 0.1 * (limit - np.median(values))


def test_outliers_come_highest_first_and_copies_of_one_image_are_none():
    assert outliers(np.array([1, 1.1, 5, 0.9, 1.05, 0.95, 7])).tolist() == [6, 2]
    assert outliers(np.array([1.0] * 9 + [1.02])).tolist() == []
    assert outliers(np.array([1, 1.1, 1.2, 9])).tolist() == []


def test_what_the_images_support_is_clopper_and_pearsons_bound():
    """None of 30 scores is above: the bound is the rate at which this has a probability of 10 %. Then 2 of 60, by the
    binomial distribution."""
    values = np.exp(np.random.default_rng(0).normal(0, 0.1, 30))
    limits = thresholds(np.stack((values, values)), 0.02)
    assert (values < limits.score).all() and limits.images == 30
    assert (1 - limits.at_most) ** 30 == pytest.approx(0.1)
    values = np.append(np.exp(np.random.default_rng(0).normal(0, 0.1, 58)), (8, 9))
    limits = thresholds(np.stack((values, values)), 0.02)
    assert (values > limits.score).sum() == 2
    assert stats.binom.cdf(2, 60, limits.at_most) == pytest.approx(0.1)
    assert thresholds(np.ones((2, 8)), 0.9).at_most == 1  # all of them are above


def test_the_allowance_by_hand():
    """The copies' threshold, at five times the rate but at most one half, divided by the limit of the images as they
    are; between 1 and the highest allowance."""
    copies = np.exp(np.random.default_rng(0).normal(0.5, 0.16, 30))
    assert allowance(1.0, copies, 0.02, most=9) == pytest.approx(threshold(copies, 0.1))
    assert allowance(0.5, copies, 0.02, most=9) == pytest.approx(threshold(copies, 0.1) / 0.5)
    assert allowance(1.0, copies, 0.3, most=9) == pytest.approx(threshold(copies, 0.5))
    assert allowance(1.0, copies, 0.02, most=1.2) == 1.2
    assert allowance(100.0, copies, 0.02, most=9) == 1


def test_drift_is_said_of_a_folder_that_moved_but_not_of_one_full_of_defects():
    rng = np.random.default_rng(0)
    normal, new = rng.normal(1, 0.1, 200), rng.normal(1, 0.1, 40)
    defects = np.append(new[:16], np.full(24, 3.0))  # 60 %
    assert drift(new, normal) == drift(defects, normal) == drift(np.full(9, 3.0), normal) == ""
    assert drift(new + 0.3, normal) == "higher" and drift(new - 0.3, normal) == "lower"


def test_verdict_lists_all_regions_highest_peak_first():
    anomaly_map = np.zeros((40, 60), dtype=np.float32)
    anomaly_map[5:10, 20:30], anomaly_map[30:33, 50:52] = 0.8, 0.9
    verdict = decide(0.7, anomaly_map, Thresholds(score=0.6, anomaly_map=0.5, images=9, at_most=0.2))
    assert verdict.anomalous and verdict.found.sum() == 56
    assert [(r.box, r.area, r.peak) for r in verdict.regions] == [
        ((50, 30, 52, 33), 6, pytest.approx(0.9)),
        ((20, 5, 30, 10), 50, pytest.approx(0.8)),
    ]


def test_anomalous_image_below_the_map_s_limit_shows_where_it_is_highest():
    anomaly_map = np.zeros((40, 60), dtype=np.float32)
    anomaly_map[30:33, 50:52] = 0.4
    assert decide(0.7, anomaly_map, Thresholds(0.6, 0.5, 9, 0.2)).regions[0].box == (50, 30, 52, 33)


def test_nothing_outside_a_small_region_of_interest_is_found():
    """The region is smaller than a thousandth of the image. Outside it the map is 0."""
    anomaly_map = np.zeros((100, 100), dtype=np.float32)
    anomaly_map[30:33, 50:53] = 0.4
    verdict = decide(0.7, anomaly_map, Thresholds(0.6, 0.5, 9, 0.2))
    assert [region.box for region in verdict.regions] == [(50, 30, 53, 33)]


def test_normal_image_has_no_regions():
    verdict = decide(0.6, np.ones((4, 4), np.float32), Thresholds(0.6, 0.5, 9, 0.2))
    assert not verdict.anomalous and not verdict.regions and not verdict.found.any()


def test_the_deviation_of_clipped_values():
    inside = stats.norm.cdf(CLIPPED_AT) - stats.norm.cdf(-CLIPPED_AT)
    variance = inside - 2 * CLIPPED_AT * stats.norm.pdf(CLIPPED_AT) + CLIPPED_AT**2 * (1 - inside)
    assert variance**0.5 == pytest.approx(CLIPPED_DEVIATION)
