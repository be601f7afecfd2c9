"""scripts/ring_model.py says what the traces say."""

import sys

import pytest

from tests.pretrain_runs import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import ring_model
from ring_model import MEASURED, Design, cycles


@pytest.mark.parametrize("name", MEASURED)
def test_the_model_is_near_the_trace(name):
    design, measured = MEASURED[name]
    found = cycles(design)
    assert found.whole == pytest.approx(measured.whole, rel=0.09)
    assert found.products == pytest.approx(measured.products, rel=0.11)
    assert found.epilogue == pytest.approx(measured.epilogue, rel=0.11)


def test_nothing_is_lost_but_what_has_a_reason(monkeypatch):
    """Where ways in and out, shared memory and fixed times cost nothing, only the products are left."""
    for name in ("PART_ACCESS", "PART_FIXED", "STAGE_FIXED", "UNIT_FIXED", "SENT_LATENCY"):
        monkeypatch.setattr(ring_model, name, 0)
    monkeypatch.setattr(ring_model, "LOAD_LATENCY", 100)
    for name in ("IN", "OUT"):
        monkeypatch.setattr(ring_model, name, 1e9)
    ideal = 16 * 2 * ring_model.WGMMAS * ring_model.WGMMA
    assert cycles(Design(adds=False)).whole == pytest.approx(ideal, rel=0.01)


def test_slower_sending_costs_products():
    windows = [cycles(Design(window=window)).whole for window in (1, 2)]
    assert windows[0] > 1.1 * windows[1]
