"""`bench trace` without a GPU: what it makes of the marks that the kernels write."""

import re
from pathlib import Path

import pytest
import torch

from megamoe_train.bench import trace

HEADER = Path(__file__).resolve().parents[1] / "csrc/roles/trace.cuh"
PERIOD, LOOP = 1000, 700  # cycles of a unit, and of its products


def enumerators(name: str) -> list[str]:
    """kFirstStage -> first_stage, in the order of the header."""
    body = re.search(rf"enum class {name} : int {{(.*?)}};", HEADER.read_text(), re.DOTALL)[1]
    words = re.findall(r"\bk(\w+)", re.sub(r"//.*", "", body))
    return [re.sub(r"(?<!^)([A-Z])", r"_\1", word).lower() for word in words]


def constant(name: str) -> int:
    return int(re.search(rf"{name} = (\d+);", HEADER.read_text())[1])


@pytest.fixture
def recorded() -> trace.Recorded:
    """Two CTAs with three units each: wgrad1 of experts 0, 1, 2. The second CTA's clock begins elsewhere."""
    marks = torch.zeros(2, trace.ROWS, trace.COLUMNS, dtype=torch.int64)
    for cta, zero in enumerate((10_000, 5_000_000)):
        own = dict(clock=zero, clock_end=zero + 4000, pulled=zero + 500, summing=zero + 3200, summed=zero + 3900)
        own |= {"global": 100 + 50 * cta, "global_end": 100 + 50 * cta + 2000}  # ns: two cycles each
        for name, value in own.items():
            marks[cta, 0, trace.CTA_MARKS.index(name)] = value
        for unit in range(3):
            begin = zero + PERIOD * unit + 100
            at = dict(unit=(3 << 32) | unit, taken=begin, first_stage=begin + 50, multiplied=begin + 50 + LOOP,
                      done=begin + 900, sent=begin + 1200, claimed=begin - 90, ready=begin - 20)  # fmt: skip
            for name, value in at.items():
                marks[cta, 1 + unit, trace.MARKS.index(name)] = value
    return trace.Recorded("bwd", marks)


def test_marks_are_those_of_the_kernels():
    assert enumerators("Mark") == list(trace.MARKS)
    assert enumerators("CtaMark") == list(trace.CTA_MARKS)
    assert (constant("kTraceRows"), constant("kTraceMarks")) == (trace.ROWS, trace.COLUMNS)
    assert len(trace.MARKS) <= trace.COLUMNS and len(trace.CTA_MARKS) <= trace.COLUMNS


def test_spans_are_medians_of_units(recorded):
    spans = recorded.spans()
    assert [name for name, found in spans.items() if found] == ["wgrad1"]
    assert spans["wgrad1"]["products"].tolist() == [LOOP] * 6
    assert spans["wgrad1"]["whole period"].tolist() == [PERIOD] * 4  # the last unit of a CTA has no next one
    assert spans["wgrad1"]["inputs awaited"].tolist() == [70] * 6
    text = trace.table(recorded)
    assert f"products {LOOP} ({LOOP})" in text and "summed: 2 to 2 us" in text


def test_clocks_of_the_sms_are_tied_to_one(recorded):
    assert recorded.microseconds(0, 10_000) == 0
    assert recorded.microseconds(0, 14_000) == pytest.approx(2.0)
    assert recorded.microseconds(1, 5_000_000) == pytest.approx(0.05)


def test_events_and_picture(recorded, tmp_path):
    events = trace.chrome(recorded)["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert all(event["dur"] >= 0 and event["ph"] == "X" for event in events)
    products = [event for event in events if event["name"].startswith("wgrad1") and event["pid"] == 0]
    assert [event["name"] for event in products] == [f"wgrad1 of expert {e}" for e in range(3)]
    assert products[1]["ts"] - products[0]["ts"] == pytest.approx(PERIOD / 2000)
    assert {event["tid"] for event in events if event["pid"] == 0} == {"scheduler", "math", "mover"}
    trace.draw(events, tmp_path / "bwd.png", "a title")
    assert (tmp_path / "bwd.png").read_bytes().startswith(b"\x89PNG")
