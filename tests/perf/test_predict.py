"""Step time on paper, against sums by hand."""

import dataclasses
import json

import pytest
from support.places import ROOT

from refalign_jax.perf.predict import CAUTIOUS, HOPEFUL, NETWORK_GBPS, Shares, predict, table

SHARES = Shares(products=0.5, attention=0.25, memory=0.8, links=0.5, hidden=0.75)
REPORT = {
    "step": "train",
    "topology": "h100:2x8",
    "platform": "gpu",
    "device": "NVIDIA H100 80GB HBM3",
    "devices": 16,
    "parameters": 1.4e9,
    "batch": 16,
    "latent_grid": [21, 60, 104],
    "references": 3,
    "mesh": {"data": 1, "fsdp": 16},
    "remat": "full",
    "tflops": {"model": 16 * 900.0, "hardware_a_device": 1000.0, "attention_a_device": 400.0},
    "passes": {"elementwise_gb": 335.0},
    "collectives": {"all-gather": {"count": 3, "gb": 10.0}, "all-to-all": {"count": 2, "gb": 9.0}},
}


def test_the_parts_by_hand():
    found = predict(REPORT, SHARES)
    assert found["products"] == pytest.approx(600 / 989 / 0.5)
    assert found["attention"] == pytest.approx(400 / 989 / 0.25)
    assert found["memory"] == pytest.approx(335 / 3350 / 0.8)
    assert found["links"] == pytest.approx((10 / NETWORK_GBPS + 9 / 450) / 0.5)
    step = found["products"] + found["attention"] + found["memory"] + found["links"] / 4
    assert found["step"] == pytest.approx(step)
    assert found["mfu"] == pytest.approx(900 / 989 / step)


def test_one_host_has_no_network():
    one = predict(REPORT | {"topology": "h100:8"}, SHARES)
    assert one["links"] == pytest.approx(19 / 450 / 0.5)


def test_the_range_of_the_table_is_that_of_the_shares():
    low, high = predict(REPORT, HOPEFUL), predict(REPORT, CAUTIOUS)
    assert all(low[part] < high[part] for part in ("products", "attention", "memory", "links", "step"))
    *_, row, _, _ = table([REPORT]).splitlines()
    assert f"{low['step']:.1f} to {high['step']:.1f} s" in row
    assert f"{100 * high['mfu']:.0f} to {100 * low['mfu']:.0f}%" in row
    assert all(0 < value <= 1 for value in dataclasses.asdict(HOPEFUL).values())


@pytest.mark.parametrize(
    "changes", [{"passes": None}, {"collectives": None}, {"device": "TPU v99"}, {"step": "sample"}]
)
def test_reports_without_what_is_needed(changes):
    report = {name: value for name, value in (REPORT | changes).items() if value is not None}
    with pytest.raises(ValueError, match="h100:2x8"):
        predict(report, SHARES)


def test_the_table_on_the_page_is_made_from_the_reports():
    reports = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/pods").glob("*.json"))]
    assert len(reports) == 4
    rows = [line for line in table(reports).splitlines() if line.startswith("|")]
    assert "\n".join(rows) in (ROOT / "docs/pods-and-memory.md").read_text()
