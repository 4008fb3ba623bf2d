"""The GPU's state beside a measurement: what nvidia-smi says, or that it says nothing."""

import os
import time

import pytest

from bench.watch import Watch


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a program in nvidia-smi's place that prints what it is told to."""

    def say(text, status=0):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return say


def test_the_spread_of_what_is_read_and_the_reasons_of_all_samples(smi):
    smi("1980, 2619, 700.12, 61, 0x0000000000000001")
    with Watch(interval=0.02) as watch:
        while not watch.lines:
            time.sleep(0.01)
        smi("1500, 2619, 350.00, 63, 0x0000000000000024")
        time.sleep(0.3)
    found = watch.summary()
    assert found["sm_mhz"][0] == 1500
    assert found["sm_mhz"][2] == 1980
    assert found["watt"][2] == 700.12
    assert found["slowed_by"] == ["power cap", "thermal, software"]


def test_what_is_not_said_is_left_out(smi):
    smi("1980, [N/A], [N/A], 61, [N/A]")
    with Watch(interval=0.02) as watch:
        pass
    assert watch.summary() == {"sm_mhz": [1980] * 3, "celsius": [61] * 3, "slowed_by": []}


def test_a_failure_and_an_absence_are_said(smi, tmp_path, monkeypatch):
    smi("Field is not valid", 2)
    with Watch() as watch:
        pass
    assert watch.summary() == {"absent": "Field is not valid"}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with Watch() as watch:
        pass
    assert "nvidia-smi" in watch.summary()["absent"]
