"""The search for thresholds, on stand-ins whose spending is known."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import NAMES, build, inputs, scripts

script = scripts[NAMES[1]]       # the block is the same in the four that have one
N = 2000
SPLIT = (torch.arange(N).byte().view(N, 1), torch.zeros(N, 1).byte())

class Leaves:
    """Two-speed stand-in: an example costs 40 where its confidence reaches the threshold, else 100."""
    cheapest, full, net = 0.0, 1.001, SimpleNamespace(macs=100)

    def __init__(self, confidence):
        self.confidence, self.asked = torch.as_tensor(confidence), 0

    def masked(self, x, threshold):
        rows = torch.arange(self.asked, self.asked + len(x)) % N            # evaluate asks in order
        self.asked += len(x)
        macs = torch.where(self.confidence[rows] >= threshold, 40, 100)
        return torch.zeros(len(x), 1, 10), macs, macs[:, None]

@pytest.mark.parametrize("center, width", ((0.5, 0.5), (0.2, 0.1), (0.9, 0.09)))
def test_budgets_are_met_or_the_nearer_end_is_taken(center, width):
    model = Leaves(center + width * np.random.default_rng(0).uniform(-1, 1, N))
    for budget in (0.42, 0.55, 0.7, 0.95):
        threshold = script.calibrate(model, SPLIT, budget)
        spent = np.where(model.confidence.numpy() >= threshold, 40, 100).mean() / 100
        assert spent == pytest.approx(budget, abs=0.003)
    assert script.calibrate(model, SPLIT, 0.3) == pytest.approx(model.cheapest, abs=1e-3)
    assert script.calibrate(model, SPLIT, 1.5) == pytest.approx(model.full)

def test_where_nothing_lies_between_the_budget_is_reached():
    """All examples are equally sure: they cost 40 or 100."""
    threshold = script.calibrate(Leaves(np.full(N, 0.5)), SPLIT, 0.6)
    assert threshold == pytest.approx(0.5, abs=1e-3) and threshold > 0.5

@pytest.mark.parametrize("name", ("gumbel_gates", "token_boost"))
def test_scores_of_any_size_are_found(name):
    """Gates that training drove to scores of thousands: both ends and the budgets between are met."""
    model = build(scripts[name], "shapes", "tiny", "--depth", "4")
    for gate in model.gates:
        for parameter in gate.parameters():
            parameter.data *= 100.0
    split = inputs("shapes", count=400), torch.zeros(400).byte()
    assert model.gates[0](torch.randn(9, 32)).abs().max() > 1000
    for budget in (0.5, 0.7, 0.85):
        threshold = script.calibrate(model, split, budget)
        spent = script.evaluate(model, model.masked, split, threshold)["means"]["budget"]
        assert spent == pytest.approx(budget, abs=0.02)
    assert script.calibrate(model, split, 2) == pytest.approx(model.full)

def test_an_evaluation_by_hand():
    """Uniform logits: every answer is 0, every loss the logarithm of 10."""
    model = Leaves(np.linspace(0, 1, N))
    result = script.evaluate(model, model.masked, SPLIT, 0.5)
    assert np.allclose(result["loss"], np.log(10)) and result["loss"].shape == (N, 1)
    assert np.array_equal(result["label"], result["prediction"]) and result["threshold"] == 0.5
    assert result["macs"].sum() == 40 * 1000 + 100 * 1000
    assert result["means"] == dict(accuracy=1.0, loss=pytest.approx(np.log(10)), budget=0.7)
