"""Pairs of runs: which are pairs, intervals, sentences."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import ttest_rel

from refalign_jax.report.compare import Pair, interval, outcome, read_pairs


def test_interval_is_the_paired_t_tests():
    one, other = np.array([0.61, 0.74, 0.66, 0.7]), np.array([0.5, 0.55, 0.61, 0.5])
    mean, low, high = interval((one - other).tolist())
    expected = ttest_rel(one, other).confidence_interval(0.95)
    assert mean == pytest.approx((one - other).mean())
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert np.isnan(interval([0.3])[1:]).all()


@pytest.mark.parametrize(
    ("aligned", "baseline", "sentence"),
    [
        ([0.5, 0.6, 0.7], [0.3, 0.41, 0.5], "is higher with alignment than with λ = 0 in all 3 pairs (mean difference"),
        ([0.5, 0.4, 0.7], [0.3, 0.41, 0.5], "in 2 of 3 pairs, so not in every seed"),
        ([0.5, 0.4, 0.7], [0.3, 0.41, 0.5], "95% interval -0.171 to +0.431; the interval includes 0)"),
        ([0.1, 0.2], [0.3, 0.41], "in 0 of 2 pairs, so not in every seed"),
        ([0.5], [0.3], "in the one pair (difference +0.2; one pair gives no interval)"),
        ([0.5, float("nan")], [0.3, 0.1], "could not be measured in every run"),
    ],
)
def test_the_outcome_is_stated_whatever_it_is(aligned, baseline, sentence):
    assert sentence in outcome("The number", aligned, baseline)


def test_pairs_that_are_none(runs):
    with pytest.raises(ValueError, match=r"have alignment weights 0\.0 and 1\.0; a pair is a run with alignment"):
        read_pairs([(runs["b0"], runs["a0"])])
    with pytest.raises(ValueError, match=r"have the seeds 0 and 1; a pair has one seed"):
        read_pairs([(runs["a0"], runs["b1"])])


def test_what_else_differs_is_named(runs):
    pair = read_pairs([(runs["a0"], runs["b0"])])[0]
    assert pair.differences() == []
    longer = dataclasses.replace(pair.baseline.config, train=dataclasses.replace(pair.baseline.config.train, steps=50))
    other = Pair(aligned=pair.aligned, baseline=dataclasses.replace(pair.baseline, config=longer))
    assert other.differences() == ["train.steps"]
