from __future__ import annotations

import pytest
import torch

from raydist.objectives.base import Mean
from raydist.training.meters import Meters


def test_each_reduction_against_its_definition() -> None:
    meters = Meters()
    for step_values in ([(1.0, 2.0), (4.0, 1.0)], [(10.0, 5.0), (0.0, 2.0)]):
        for total, count in step_values:
            meters.add_mean("loss/ntp", Mean(total=torch.tensor(total), count=torch.tensor(count)))
            meters.add_share("loss", torch.tensor(total / 8))
        meters.add_max("grad_norm", torch.tensor(step_values[0][0]))
        meters.end_step()
    values = meters.read()
    assert values == {
        "loss/ntp": pytest.approx(15 / 10),  # ratio of sums, not mean of ratios
        "loss": pytest.approx((5 / 8 + 10 / 8) / 2),  # parts of a step add up, steps are averaged
        "grad_norm": 10.0,
    }
    assert meters.read() == {}


def test_a_mean_over_nothing_is_left_out() -> None:
    meters = Meters()
    meters.add_mean("loss/matp", Mean(total=torch.tensor(0.0), count=torch.tensor(0.0)))
    meters.end_step()
    assert meters.read() == {}
