"""The search for thresholds, on stand-ins whose spending is known."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import NAMES, build, inputs, scripts

script = scripts[NAMES[0]]       # the evaluation block is the same in all
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
def test_budgets_are_met_or_left_out(center, width, monkeypatch, capsys):
    model = Leaves(center + width * np.random.default_rng(0).uniform(-1, 1, N))
    monkeypatch.setattr(script, "BUDGETS", (0.39, 0.42, 0.55, 0.7, 0.95, 1.01))
    own, found = script.calibrate(model, SPLIT, 0.55)
    assert own == found[0.55]
    assert script.calibrate(model, SPLIT, 0.3)[0] == model.cheapest
    assert "0.3 is out of reach; 0.400 is the least" in capsys.readouterr().err
    assert script.calibrate(model, SPLIT)[0] == pytest.approx(center + width, abs=0.01)
    assert list(found) == [0.42, 0.55, 0.7, 0.95, 1.0] and found[1.0] == model.full
    for budget, threshold in list(found.items())[:-1]:
        spent = np.where(model.confidence.numpy() >= threshold, 40, 100).mean() / 100
        assert spent == pytest.approx(budget, abs=0.003)


def test_where_nothing_lies_between_the_nearer_end_is_taken():
    """All examples are equally sure: they cost 40 or 100."""
    for budget, spent in ((0.6, 40), (0.8, 100)):
        threshold, _ = script.calibrate(Leaves(np.full(N, 0.5)), SPLIT, budget)
        assert (100 if threshold > 0.5 else 40) == spent


@pytest.mark.parametrize("name", ("gumbel_gates", "token_boost"))
def test_scores_of_any_size_are_found(name):
    """Gates that training drove to scores of thousands: both ends and the budgets between are met."""
    model = build(scripts[name], "shapes", "tiny", "--depth", "4")
    for gate in model.gates:
        for parameter in gate.parameters():
            parameter.data *= 100.0
    split = inputs("shapes", count=400), torch.zeros(400).byte()
    scores = model.gates[0](torch.randn(9, 32))
    assert scores.abs().max() > 1000
    found = script.calibrate(model, split, 0.5)[1]
    assert list(found)[0] <= 0.5 and list(found)[-1] > 1 and found[list(found)[-1]] == model.full
    for budget, threshold in found.items():
        spent = script.summary(model, script.evaluate(model.masked, split, threshold))["budget"]
        assert spent == pytest.approx(budget, abs=0.02)


def test_an_evaluation_by_hand():
    """Uniform logits: every answer is 0, every loss the logarithm of 10."""
    result = script.evaluate(Leaves(np.linspace(0, 1, N)).masked, SPLIT, 0.5)
    assert np.allclose(result["loss"], np.log(10)) and result["loss"].shape == (N, 1)
    assert np.array_equal(result["label"], result["prediction"]) and result["threshold"] == 0.5
    assert result["macs"].sum() == 40 * 1000 + 100 * 1000
    means = script.summary(Leaves([]), result)
    assert means == dict(accuracy=1.0, loss=pytest.approx(np.log(10)), budget=0.7)
