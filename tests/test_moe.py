"""Who runs, what it costs, that dispatch computes what a loop would, and what the losses say."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import moe as script
from conftest import build, inputs, steps, thresholds, trained
from test_contract import executed_macs

ROUTINGS = ("top_p", "top_k", "relu")

def layer():
    """x (40, 6), router weights with about half of 4 experts chosen, and experts, in float64."""
    torch.manual_seed(0)
    weight = torch.rand(40, 4).double() * (torch.rand(40, 4) < 0.5)
    return torch.randn(40, 6).double(), weight, script.Experts(6, 4, 5).double()

def loop(x, weight, experts):
    """Tokens and experts one by one, and the shared one."""
    y = []
    for token, w in zip(x, weight):
        total = experts.shared[2](experts.shared[0](token).relu())
        for e, (up, _, down) in enumerate(experts.experts):
            if w[e] > 0:
                total = total + w[e] * down.weight @ (up.weight @ token + up.bias).relu()
        y.append(total)
    return torch.stack(y)

def test_need_by_hand():
    """p = (0.2, 0.5, 0.3): the best is expert 1, then 2, then 0."""
    scores = torch.tensor([[0.2, 0.5, 0.3]]).log()
    for routing, expected in (("top_p", [0.8, 0.0, 0.5]), ("top_k", [2 / 3, 0.0, 1 / 3])):
        weight, needed = script.weigh(scores, routing)
        assert weight[0].tolist() == pytest.approx([0.2, 0.5, 0.3])
        assert needed[0].tolist() == pytest.approx(expected)
        ties = script.weigh(torch.zeros(2, 3, 4), routing)[1]
        assert ties.shape == (2, 3, 4) and ((ties < 1e-6).sum(-1) == 1).all()
        sharp = torch.randn(500, 8).mul(20)                  # some are 0 or 1 in float32
        weight, needed = script.weigh(sharp, routing)
        assert (needed.argmin(-1) == sharp.argmax(-1)).all()
        assert needed.min() >= 0 and (needed < 1.001).all()
    weight, needed = script.weigh(torch.tensor([[-1.0, 0.0, 2.0]]), "relu")
    assert weight.tolist() == [[0, 0, 2]] and (needed < 0).tolist() == [[False, False, True]]
    with pytest.raises(AssertionError, match="none of"):
        script.weigh(scores, "topk")

def test_experts_equal_a_loop_in_values_and_gradients():
    x, weight, experts = layer()
    weight[:, 2] = 0                                         # an expert that receives no token
    weight[7] = 0                                            # a token that runs none: shared alone
    weight[8] = 0.3 * torch.tensor([1.0, 1, 0, 1])
    results = []
    for run in (loop, lambda x, weight, experts: experts.dispatch(x, weight),
                lambda x, weight, experts: experts(x, weight)):
        leaves = [v.clone().requires_grad_() for v in (x, weight)]
        y = run(*leaves, experts)
        grads = list(torch.autograd.grad((y * torch.arange(6)).square().sum(),
                                         [*leaves, *experts.parameters()], materialize_grads=True))
        grads[1] = grads[1] * (weight > 0)                   # what is not chosen is not learnt from
        results.append([y, *grads])
    for other in results[1:]:
        for expected, found in zip(results[0], other):
            assert torch.allclose(expected, found, atol=1e-10)
    assert torch.allclose(experts.dispatch(x, weight)[7], experts.shared(x[7]))

def test_dispatch_reads_any_shape_dtype_and_a_single_token():
    x, weight, experts = layer()
    whole = experts.dispatch(x, weight)
    assert torch.allclose(experts.dispatch(x.view(4, 10, 6), weight.view(4, 10, 4)).flatten(0, 1), whole)
    assert torch.allclose(experts.dispatch(x[5:6], weight[5:6]), whole[5:6])
    half = experts.bfloat16()                                # and the router in float32
    y, expected = half.dispatch(x.bfloat16(), weight.float()), half(x.bfloat16(), weight.float())
    assert y.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(y.double(), whole, atol=0.05) and torch.allclose(y, expected, atol=0.05)

@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_contract_holds_for_every_routing(dataset, routing):
    """And at the lowest threshold the shared expert runs alone, at the highest all of a weight not 0."""
    model = build(script, dataset, "tiny", "--routing", routing).double()
    x = inputs(dataset, count=6, dtype=torch.float64)
    fixed = model.net.macs + 2 * 64 * (32 * 4 + 2 * 32 * 16 - 8 * 32 * 32)  # routers, shared, no MLPs
    spent = []
    for threshold in thresholds(model, x):
        executed, skipping = executed_macs(model.skipping, x, threshold)
        masked, alone = model.masked(x, threshold), model.skipping(x[2:3], threshold)
        assert executed == skipping[1].sum()
        for a, b, c in zip(masked, skipping, alone):
            assert torch.allclose(a.double(), b.double(), atol=1e-9, rtol=0)
            assert torch.allclose(b[2:3].double(), c.double(), atol=1e-9, rtol=0)
        spent.append((skipping[1].double().mean().item() - fixed) / (2 * 64 * 2 * 32 * 32))
    most = model.dense(x, model.full)[1].sum(-1).mean().item()              # experts of a token and layer
    assert spent[0] == 0 and 0 < spent[1] <= spent[-1] == pytest.approx(most)
    assert most == pytest.approx(4) if routing != "relu" else 1 < most < 3

def test_the_control_deals_counts_and_the_router_names_the_experts():
    """Counts of another token: as many of its own, those of least need; its own counts change nothing."""
    model, x = build(script, "pydoc", "tiny", "--routing", "top_p"), inputs("pydoc")
    threshold = thresholds(model, x, (0.5,))[0]
    logits, chosen, _, _ = model.dense(x, threshold)
    again, same, _, _ = model.dense(x, decisions=chosen)
    assert torch.equal(logits, again) and torch.equal(chosen, same)
    dealt = chosen.roll(1, 2)
    _, found, _, needed = model.dense(x, decisions=dealt)
    assert torch.equal(found.sum(-1), dealt.sum(-1)) and not torch.equal(found, dealt)
    first = slice(0, 1)                                     # later layers see other states
    order = needed[first].argsort(-1)
    ranked = found[first].gather(-1, order)
    assert (ranked[..., 1:] <= ranked[..., :-1]).all()
    relu, dealt = build(script, "pydoc"), torch.zeros(2, 8, 64, 4)
    dealt[..., :3] = 1                                      # more than have a weight: they add nothing
    logits, found, scores, _ = relu.dense(x, decisions=dealt)
    assert found.sum(-1).eq(3).all() and (scores > 0).sum(-1).min() < 3
    more = relu.dense(x, decisions=torch.ones_like(dealt))[0]
    assert not torch.equal(more, logits) and torch.allclose(more, relu.masked(x, relu.full)[0], atol=1e-5)

def test_balance_loss_is_one_at_uniform_load():
    """1 or 2 of 8 experts in turn, top_p on permutations; 4 for everything on 2 of 8, pushed down."""
    turn = torch.eye(8)[torch.arange(64) % 8]
    for chosen in (turn, turn + turn.roll(1, 1)):
        assert script.balance_loss(torch.full((64, 8), 1 / 8), chosen).item() == pytest.approx(1)
    p = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
    p = torch.stack([p.roll(i) for i in range(8)])
    chosen = script.weigh(p.log(), "top_p")[1] < 0.65
    assert chosen.sum(-1).tolist() == [3] * 8
    assert script.balance_loss(p, chosen).item() == pytest.approx(1)
    skewed = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0]]).expand(5, 8)
    assert script.balance_loss(skewed / 2, skewed).item() == pytest.approx(4)
    logits = torch.zeros(5, 8, requires_grad=True)
    script.balance_loss(logits.softmax(-1), skewed).backward()
    assert (logits.grad[:, :2] > 0).all() and (logits.grad[:, 2:] < 0).all()
    both = torch.stack([p.new_full((8, 8), 1 / 8), skewed[:1].expand(8, 8) / 2])   # layers apart
    assert script.balance_loss(both, torch.stack([turn[:8], skewed[:1].expand(8, 8)])).tolist() == [1, 4]

def test_top_k_is_tested_as_it_was_trained(run, shorten, tmp_path):
    """0.7 of the MACs is calibrated to 2 experts, next above; training runs 1 in each of 2 layers."""
    shorten(script, 20)
    options = "--dataset", "pydoc", "--size", "tiny", "--depth", "3", "--routing", "top_k", "--budget", "0.7"
    assert run("moe", *options, "--device", "cpu", *steps(2), cwd=tmp_path)[0] == 0
    model, macs = build(script, "pydoc"), np.load(tmp_path / "logs/pydoc-tiny/moe-s0.npz")["token_macs"]
    assert (macs == model.fixed_macs + 2 * model.expert_macs).all()

def test_the_task_teaches_the_router_at_k_1(monkeypatch):
    """The gradient of the cross-entropy alone; were the weights renormalised, it would vanish."""
    model, x = build(script, "pydoc", "tiny", "--routing", "top_k", "--budget", "0.5"), inputs("pydoc")
    assert model.k == 1
    raw, sizes = script.Experts.forward, []

    def renormalised(self, x, weight):
        return raw(self, x, weight / weight.sum(-1, keepdim=True))

    for forward in (raw, renormalised):
        monkeypatch.setattr(script.Experts, "forward", forward)
        logits, chosen, _, _ = model.dense(x)
        assert chosen.sum(-1).eq(1).all()
        loss = F.cross_entropy(logits.movedim(-1, 1), x.roll(-1, 1))
        grads = torch.autograd.grad(loss, model.routers.parameters())
        sizes.append(max(grad.abs().max().item() for grad in grads))
    assert sizes[0] > 1e-4 and sizes[1] < 1e-4 * sizes[0]

def test_the_loss_by_hand():
    """What is shown is the cross-entropy alone; the auxiliary losses are those of the formulas."""
    model, x = build(script, "pydoc", "tiny", "--balance", "5", "--routing", "top_p"), inputs("pydoc")
    y = x.roll(-1, 1)
    loss, shown = model.loss(x, y, 0.5)
    logits, chosen, scores, _ = model.dense(x)
    plain = -logits.log_softmax(-1).gather(-1, y[..., None]).mean()
    assert shown["loss"].item() == pytest.approx(plain.item(), abs=1e-5)
    balance = z = entropy = 0
    for s, w in zip(scores, chosen):                            # two layers
        q = s.softmax(-1)
        f, P = w.flatten(0, 1).mean(0), q.flatten(0, 1).mean(0)
        balance += 4 * (f / f.sum() * P).sum() / 2
        z += s.exp().sum(-1).log().square().mean() / 2
        entropy -= (q * q.log()).sum(-1).mean() / 2
    expected = plain + 5 * balance + 1e-3 * z + 1e-4 * entropy
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

@pytest.mark.parametrize("balance", ("0", "1"))
def test_the_penalty_of_relu_by_hand(balance):
    """By an expert's share of the work, or alike for all; training alone raises it, or lowers it."""
    model, x = build(script, "pydoc", "tiny", "--balance", balance), inputs("pydoc")
    loss, shown = model.loss(x, x, 0.5)
    _, chosen, scores, _ = model.dense(x)
    used = 0
    for s, w in zip(scores, chosen):                            # two layers
        f = w.flatten(0, 1).mean(0) if balance == "1" else torch.ones(4)
        used += 4 * (f / f.sum() * s.relu().flatten(0, 1).mean(0)).sum() / 2
    assert loss.item() == pytest.approx((shown["loss"] + 1e-3 * used).item(), rel=1e-5)
    assert model.penalty.item() == pytest.approx(1e-3)
    model.train()
    for k, expected in ((0.5, 1.05e-3), (3.5, 1e-3), (3.5, 1e-3 / 1.05)):
        model.k = k
        model.loss(x, x, 0.5)
        assert model.penalty.item() == pytest.approx(expected)

@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_sharp_router_has_a_gradient(routing):
    """Probabilities of exactly 0 in float32: their entropy is 0, and so is its derivative."""
    model, x = build(script, "pydoc", "tiny", "--routing", routing), inputs("pydoc")
    for router in model.routers:
        router.out.weight.data *= 1000
    loss, _ = model.loss(x, x, 0.5)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())

@pytest.mark.parametrize("routing", ("top_p", "top_k"))
def test_the_threshold_of_training(routing):
    """It meets the budget; `masked` with it is what was trained; evaluation leaves it; it is saved."""
    model, x = build(script, "pydoc", "tiny", "--routing", routing, "--budget", "0.8"), inputs("pydoc", count=32)
    if routing == "top_p":
        model.threshold.fill_(0.9)
    model.train()
    for _ in range(60):
        _, shown = model.loss(x, x, 0.5)
    assert shown["experts"].item() == pytest.approx(model.k, abs=0.05)
    model.eval()
    before = model.threshold.clone()
    logits = model.dense(x)[0]
    _, _ = model.loss(x, x, 0.5)
    masked, macs, _ = model.masked(x, model.threshold)
    assert torch.equal(before, model.threshold) and torch.equal(logits, masked)
    if routing == "top_p":
        assert macs.double().mean() / model.net.macs == pytest.approx(0.8, abs=0.02)      # a seventh of 32 examples
    other = build(script, "pydoc", "tiny", "--routing", routing, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.threshold, model.threshold)

def test_specialisation_by_hand():
    """Two kinds, 30 and 10 tokens. Layer 1: each has an expert, as many bits as the kinds have. Layer
    2: all run both, 0 bits. An expert that nobody runs changes nothing."""
    kind = np.repeat([7, 3], [30, 10])
    chosen = np.array([[kind == 7, kind == 3, kind < 0], [kind > 0, kind > 0, kind < 0]]).transpose(0, 2, 1)
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert script.specialisation(chosen, kind) == pytest.approx([entropy, 0], abs=1e-3)

def test_training_meets_the_budget():
    """With relu the penalty brings it about; the budget is the calibration's at the latest."""
    model, data, few = trained(script, 200, "--budget", "0.6")
    threshold = script.calibrate(model, [part[:100] for part in data["calibration"]], 0.6)
    result = script.evaluate(model, model.skipping, few, threshold)
    assert result["means"]["budget"] == pytest.approx(0.6, abs=0.02)
    assert np.ptp(result["macs"]) > 0
    most = script.evaluate(model, model.skipping, few, model.full)["means"]["budget"]
    assert 0.59 <= most < 0.75
