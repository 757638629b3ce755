"""The search for thresholds, on stand-ins whose spending is known."""
import numpy as np
import pytest
import torch

from first_edition.conftest import NAMES, scripts

script = scripts[NAMES[0]]       # the evaluation block is the same in all
N = 2000
SPLIT = (torch.arange(N).byte().view(N, 1), torch.zeros(N, 1).byte())


class Leaves:
    """Two-speed stand-in: an example costs 40 where its confidence reaches the threshold, else 100."""
    cheapest, full, dense_macs = 0.0, 1.0, 100

    def __init__(self, confidence):
        self.confidence, self.passes = torch.as_tensor(confidence), 0

    def masked(self, x, threshold):
        rows = torch.arange(self.passes, self.passes + len(x)) % N      # evaluate asks in order
        self.passes += len(x)
        macs = torch.where(self.confidence[rows] >= threshold, 40, 100)
        return torch.zeros(len(x), 1, 10), macs, macs[:, None]


@pytest.mark.parametrize("center, width", ((0.5, 0.5), (0.2, 0.02), (0.14, 0.0005), (0.999, 0.0009)))
@pytest.mark.parametrize("budget", (0.42, 0.55, 0.7, 0.95))
def test_the_budget_is_met_wherever_the_confidences_lie(center, width, budget):
    rng = np.random.default_rng(0)
    model = Leaves(center + width * rng.uniform(-1, 1, N))
    threshold, sweep = script.calibrate(model, SPLIT, budget)
    spent = np.where(model.confidence.numpy() >= threshold, 40, 100).mean() / 100
    assert spent == pytest.approx(budget, abs=0.003)
    assert len(sweep) == 9 and sweep[0] == 0.0 and sweep[-1] == 1.0
    assert model.passes <= N * 60


def test_a_jump_is_said_and_the_impossible_refused(capsys):
    model = Leaves(np.full(N, 0.3))                         # all or nothing: 0.4 or 1
    threshold, _ = script.calibrate(model, SPLIT, 0.6)
    assert 0.0 <= threshold <= 0.3 and "nearest spends 0.400" in capsys.readouterr().out
    for budget in (0.39, 1.01):
        with pytest.raises(script.UserError, match="can spend 0.400 to 1.000"):
            script.calibrate(model, SPLIT, budget)


def test_no_budget_no_search():
    assert script.calibrate(Leaves(np.linspace(0, 0.99, N)), SPLIT)[0] is None


def test_the_sweep_spreads_over_the_spending():
    """Confidences crowd near 1, so equal steps of the threshold would leave the middle empty: the
    sweep takes equal steps in MACs, from 40 to 100 in eight, each met within a third of one."""
    for power in (4, 7):
        model = Leaves(1 - np.linspace(0.001, 1, N) ** power * 0.9 - 1e-4)
        _, sweep = script.calibrate(model, SPLIT)
        spent = [np.where(model.confidence.numpy() >= t, 40, 100).mean() for t in sweep]
        assert spent == pytest.approx(np.linspace(40, 100, 9), abs=7.5 / 3)
