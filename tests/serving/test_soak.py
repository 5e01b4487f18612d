"""The short form of `make soak`: replicas are killed, the application is replaced, clients leave; nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.local import local_ray
from tests.serving.soak import Soak

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

SECONDS = 40.0


def test_every_request_ends_in_a_right_answer_or_a_typed_error() -> None:
    with local_ray(3, dashboard=False) as ray:
        report = Soak(ray, Path("training/demo/model").absolute()).run(SECONDS)
    assert report.wrong == []
    assert report.untyped == []
    assert report.kills >= 1
    assert report.updates == 1
    assert report.ends["answered"] > 20, report.ends
    assert set(report.samples) == {"proxy", "controller"}
