"""Who runs, what it costs, that dispatch computes what a loop would, and what the losses say."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import moe as script
from first_edition.conftest import build, inputs, thresholds
from test_contract import executed_macs

ROUTINGS = ("top_p", "top_k", "dynamic_k")
DATASETS = ("shapes", "pydoc")


def layer(E=4, C=6, h=5, N=40, seed=0):
    """Router weights with about half of the experts chosen, and a wide MLP, in float64."""
    torch.manual_seed(seed)
    up, down = torch.nn.Linear(C, E * h).double(), torch.nn.Linear(E * h, C).double()
    weight = torch.rand(N, E).double() * (torch.rand(N, E) < 0.5)
    return torch.randn(N, C).double(), weight, up, down


def loop(x, weight, up, down):
    """Tokens and experts one by one."""
    E, y = weight.shape[1], []
    h = up.out_features // E
    for token, w in zip(x, weight):
        total = down.bias
        for e in range(E):
            if w[e] > 0:
                mine = slice(e * h, (e + 1) * h)
                total = total + w[e] * down.weight[:, mine] @ (up.weight[mine] @ token
                                                               + up.bias[mine]).relu()
        y.append(total)
    return torch.stack(y)


def test_need_by_hand():
    """p = (0.2, 0.5, 0.3): the best is expert 1, then 2, then 0."""
    p = torch.tensor([[0.2, 0.5, 0.3]])
    for routing, expected in (("top_p", [0.8, 0.0, 0.5]), ("dynamic_k", [0.6, 0.0, 0.4]),
                              ("top_k", [2 / 3, 0.0, 1 / 3])):
        assert script.need(p, routing)[0].tolist() == pytest.approx(expected)
        ties = script.need(torch.full((2, 3, 4), 0.25), routing)
        assert ties.shape == (2, 3, 4) and (ties.amin(-1) == 0).all()
        if routing != "dynamic_k":                           # there, equals run together
            assert ((ties < script.Model.cheapest).sum(-1) == 1).all()
        sharp = torch.randn(500, 8).mul(20).softmax(-1)      # some are 0 or 1 in float32
        needed = script.need(sharp, routing)
        assert (needed.argmin(-1) == sharp.argmax(-1)).all()
        assert needed.min() >= 0 and (needed < script.Model.full).all()


def test_threshold_for_spends_what_was_asked():
    torch.manual_seed(0)
    needed = script.need(torch.randn(3, 50, 8).softmax(-1), "top_p")
    for k in (1.0, 1.5, 2.94, 7.9):
        ran = (needed < script.threshold_for(needed, k)).sum(-1).float().mean().item()
        assert ran == pytest.approx(k, abs=1 / 150)
    assert (needed < script.threshold_for(needed, 8.0)).all()
    ranks = script.need(torch.randn(3, 50, 8).softmax(-1), "top_k")
    assert ((ranks < script.threshold_for(ranks, 3)).sum(-1) == 3).all()


def test_dispatch_equals_a_loop_in_values_and_gradients():
    x, weight, up, down = layer()
    weight[:, 2] = 0                                         # an expert that receives no token
    weight[7] = 0                                            # a token that runs none: bias alone
    weight[8] = 0.3 * torch.tensor([1.0, 1, 0, 1])
    results = []
    for run in (loop, script.dispatch, script.every_expert):
        inputs_ = [v.clone().requires_grad_() for v in (x, weight)]
        y = run(*inputs_, up, down)
        leaves = [*inputs_, *up.parameters(), *down.parameters()]
        grads = list(torch.autograd.grad((y * torch.arange(6)).square().sum(), leaves))
        grads[1] = grads[1] * (weight > 0)                   # what is not chosen is not learnt from
        results.append([y, *grads])
    for other in results[1:]:
        for expected, found in zip(results[0], other):
            assert torch.allclose(expected, found, atol=1e-10)
    assert torch.equal(script.dispatch(x, weight, up, down)[7], down.bias)


def test_dispatch_reads_any_shape_and_a_single_token():
    x, weight, up, down = layer()
    whole = script.dispatch(x, weight, up, down)
    folded = script.dispatch(x.view(4, 10, 6), weight.view(4, 10, 4), up, down)
    assert torch.allclose(folded, whole.view(4, 10, 6), atol=1e-12)
    for i in range(5):
        assert torch.allclose(script.dispatch(x[i:i + 1], weight[i:i + 1], up, down), whole[i:i + 1])


def test_dispatch_trains_in_bf16_as_well():
    x, weight, up, down = (v.float() for v in layer())
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = (run(x, weight, up, down) for run in (script.dispatch, script.every_expert))
    y.square().sum().backward()
    assert torch.allclose(y, expected.float(), atol=0.05) and up.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_contract_holds_for_every_routing(dataset, routing):
    """What runs is what is counted; skipping, masked and a single example agree; all experts run
    at the highest threshold, one per token and layer at the lowest."""
    model, x = build(script, dataset, routing=routing), inputs(dataset, count=6)
    double = build(script, dataset, routing=routing).double()
    v = x.double() if x.is_floating_point() else x
    spent = []
    for threshold in thresholds(model, x):
        executed, (logits, macs, _) = executed_macs(model.skipping, x, threshold)
        assert executed == macs.sum()
        assert torch.allclose(logits, model.masked(x, threshold)[0], atol=1e-4, rtol=0)
        masked, skipping = double.masked(v, threshold), double.skipping(v, threshold)
        assert torch.allclose(masked[0], skipping[0], atol=1e-10, rtol=0)
        assert torch.equal(masked[1], skipping[1]) and torch.equal(masked[2], skipping[2])
        alone = double.skipping(v[2:3], threshold)
        assert torch.allclose(alone[0], skipping[0][2:3], atol=1e-10, rtol=0)
        assert torch.equal(alone[1], skipping[1][2:3])
        spent.append(macs.double().mean().item() / model.dense_macs)
    assert spent[0] == pytest.approx(model.floor) and spent[-1] == pytest.approx(model.ceiling)


def test_macs_by_hand():
    """shapes, tiny: C 32, 2 layers, 64 tokens, 16 experts of 16 neurons, k of them everywhere."""
    model, x = build(script, "shapes", routing="top_k"), inputs("shapes", count=2)
    for k in (1, 3, 16):
        _, macs, token_macs = model.skipping(x, (k - 0.5) / 16)
        token = 2 * (4 * 32 * 32 + 2 * 64 * 32 + 32 * 16 + k * 2 * 32 * 16)
        stem = 256 * (27 * 16 + 9 * 16 + 16 * 16) + 64 * (9 * 16 * 32 + 9 * 32 + 32 * 32)
        assert token_macs.eq(token).all() and macs.tolist() == [64 * token + stem + 320] * 2


@pytest.mark.parametrize("dataset", DATASETS)
def test_one_expert_is_a_plain_mlp(dataset):
    """E = 1 with all the neurons of the twin's MLP: the twin itself, and the price of its router."""
    model, x = build(script, dataset, experts=1, hidden=128), inputs(dataset)
    with torch.no_grad():
        dense = model.twin(x)                  # its blocks hold the one expert as their up and down
        assert torch.allclose(model(x)[0], dense, atol=1e-5)
    for run in (model.masked, model.skipping):
        for threshold in (model.cheapest, model.full):
            logits, macs, _ = run(x, threshold)
            assert torch.allclose(logits, dense, atol=1e-4)
            assert macs.tolist() == [model.dense_macs + 2 * 64 * 32] * 8
    assert model.floor == model.ceiling and model.k == 1


def test_a_batch_of_one_token():
    model = build(script, "pydoc")
    x = torch.tensor([[65]])
    for threshold in (model.cheapest, 0.3, model.full):
        skipping, masked = model.skipping(x, threshold), model.masked(x, threshold)
        assert skipping[0].shape == (1, 1, 128) and torch.allclose(skipping[0], masked[0], atol=1e-5)
        assert executed_macs(model.skipping, x, threshold)[0] == skipping[1].item()


def test_experts_without_a_token():
    """Every router sends everything to expert 3."""
    model, x = build(script, "shapes", routing="top_p"), inputs("shapes")
    with torch.no_grad():
        for block, router in zip(model.twin.blocks, model.routers):
            block.norm2.bias[0] = 50.0
            router.weight.zero_()
            router.weight[3, 0] = 1.0
    *_, weight = model.route(x, 0.5, script.dispatch)
    assert (weight[..., 3] > 0).all() and weight.count_nonzero() == weight[..., 3].numel()
    assert torch.allclose(model.skipping(x, 0.5)[0], model.masked(x, 0.5)[0], atol=1e-4)


def test_balance_loss_is_one_at_uniform_load():
    """k = 1 and 2 in turn around 8 experts, and top_p on permutations of one distribution; 4 for
    everything on 2 of 8 experts; its gradient pushes down what is used too much."""
    turn = torch.eye(8)[torch.arange(64) % 8]
    for chosen in (turn, turn + turn.roll(1, 1)):
        assert script.balance_loss(torch.full((64, 8), 1 / 8), chosen).item() == pytest.approx(1)
    p = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
    p = torch.stack([p.roll(i) for i in range(8)])
    chosen = script.need(p, "top_p") < 0.65
    assert chosen.sum(-1).tolist() == [3] * 8
    assert script.balance_loss(p, chosen).item() == pytest.approx(1)

    skewed = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0]]).expand(5, 8)
    assert script.balance_loss(skewed / 2, skewed).item() == pytest.approx(4)
    logits = torch.zeros(5, 8, requires_grad=True)
    script.balance_loss(logits.softmax(-1), skewed).backward()
    assert (logits.grad[:, :2] > 0).all() and (logits.grad[:, 2:] < 0).all()
    both = torch.stack([p.new_full((8, 8), 1 / 8), skewed[:1].expand(8, 8) / 2])   # layers apart
    assert script.balance_loss(both, torch.stack([turn[:8], skewed[:1].expand(8, 8)])).tolist() == [1, 4]


def test_the_task_teaches_the_router_at_k_1():
    """The gradient of the cross-entropy alone; were the weights renormalised, it would vanish."""
    model, x = build(script, "pydoc", routing="top_k", budget=0.64), inputs("pydoc")
    assert model.k == 1
    raw = script.every_expert

    def renormalised(x, weight, up, down):
        return raw(x, weight / weight.sum(-1, keepdim=True), up, down)

    sizes = []
    for experts in (raw, renormalised):
        logits, _, _, _, weight = model.route(x, model.train_threshold, experts)
        assert (weight > 0).sum(-1).eq(1).all()
        loss = script.cross_entropy(logits, x.roll(-1, 1)).mean()
        grads = torch.autograd.grad(loss, model.routers.parameters())
        sizes.append(max(grad.abs().max().item() for grad in grads))
    assert sizes[0] > 1e-4 and sizes[1] < 1e-4 * sizes[0]


def test_what_is_reported_is_the_cross_entropy_alone():
    """In the log, and in the progress bar; the auxiliary losses are those of the formulas."""
    model, x = build(script, "pydoc", balance=5.0), inputs("pydoc")
    y = x.roll(-1, 1)
    logits, aux_loss = model(x)
    plain = -logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]
    loss, shown = script.objective(model, x, y)
    assert shown["loss"].item() == pytest.approx(plain.mean().item(), abs=1e-5)
    assert loss.item() == pytest.approx(plain.mean().item() + aux_loss.item(), abs=1e-5)
    _, scores, p, _, weight = model.route(x, model.train_threshold, script.every_expert)
    balance = z = entropy = 0
    for s, q, w in zip(scores, p, weight):                      # two layers
        f, P = (w > 0).flatten(0, 1).float().mean(0), q.flatten(0, 1).mean(0)
        balance += 16 * (f / f.sum() * P).sum() / 2
        z += s.exp().sum(-1).log().square().mean() / 2
        entropy -= (q * q.log()).sum(-1).mean() / 2
    assert aux_loss.item() == pytest.approx((5 * balance + 1e-3 * z + 1e-4 * entropy).item(), rel=1e-6)
    model.balance = 0.0
    assert model(x)[1].item() == pytest.approx((1e-3 * z + 1e-4 * entropy).item(), rel=1e-5)
    stored = x.byte(), y.byte()
    logged = script.evaluate(model.masked, stored, model.train_threshold.item())["loss"]
    assert np.allclose(logged, plain.detach(), atol=1e-4)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_evaluation_is_what_was_trained(routing):
    """At the threshold of training `masked` computes what `forward` does, and a few batches bring
    the mean number of experts to the budget's, from a wrong start too; evaluation moves nothing."""
    model, x = build(script, "pydoc", routing=routing), inputs("pydoc", count=32)
    assert model.k == (2 if routing == "top_k" else pytest.approx(2.1, abs=0.01))
    if routing != "top_k":
        model.train_threshold.fill_(0.9)
    model.train()
    for _ in range(60):
        model(x)
    model.eval()
    before = model.train_threshold.clone()
    logits, _ = model(x)
    assert torch.equal(before, model.train_threshold) and len(model.loads) == 60
    assert model.mean_experts.item() == pytest.approx(model.k, abs=0.03)
    masked, macs, _ = model.masked(x, model.train_threshold)
    assert torch.allclose(logits, masked, atol=1e-5)
    if routing != "top_k":
        assert macs.double().mean() / model.dense_macs == pytest.approx(0.7, abs=0.002)
    assert torch.allclose(torch.stack(model.loads).sum(-1), torch.ones(60, 2))


def test_information_by_hand():
    """Independent 0 bits; expert = class, of 4 equally frequent classes, 2 bits; half of the time
    right between two, 1 - h(1/4) bits; layers apart."""
    assert script.information(np.outer([1, 2, 3], [5, 1])) == pytest.approx(0, abs=1e-12)
    assert script.information(np.eye(4)) == pytest.approx(2)
    h = -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    both = np.array([[[3, 1], [1, 3]], [[7, 0], [0, 7]]])
    assert script.information(both).tolist() == pytest.approx([1 - h, 1])


def test_use_is_what_a_loop_counts_and_the_control_is_low():
    rng = np.random.default_rng(0)
    label = rng.integers(10, size=300)
    chosen = rng.random((2, 300, 4, 8)) < 0.3
    vehicle = np.isin(label, (0, 1, 8, 9))                      # airplane, automobile, ship, truck
    chosen[1] = False
    chosen[1, ..., 0], chosen[1, ..., 5] = vehicle[:, None], ~vehicle[:, None]
    counts = script.use_by_label(chosen, label, 10)
    assert counts.shape == (2, 10, 8)
    assert counts[1, 3, 5] == sum(chosen[1, n, t, 5] for n in range(300) for t in range(4)
                                  if label[n] == 3)
    each = np.arange(1200).reshape(300, 4) % 7                  # a label for every token
    counts = script.use_by_label(chosen, each, 7)
    assert counts[0, 6, 2] == (chosen[0, ..., 2] & (each == 6)).sum()

    cfg = script.Config(dataset="cifar10", size="tiny", device="cpu")
    found = script.specialisation(cfg, chosen, label)
    share = vehicle.mean()
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    for key in ("information_animal", "information_class"):     # all that there is to know
        assert found[key] == [pytest.approx(0, abs=0.05), pytest.approx(entropy)]
        assert found[key + "_shuffled"][1] < 0.1 * entropy
    assert np.allclose(np.sum(found["load"], 1), 1) and found["dead_experts"] == 6
    chosen[:] = False
    chosen[..., 3] = True
    found = script.specialisation(cfg, chosen, label)
    assert found["load_entropy"] == [0, 0] and found["dead_experts"] == 14
    assert found["mean_experts"] == [1, 1] and found["information_class"] == [0, 0]


def test_training_meets_the_budget():
    """`shapes`, 100 steps: the calibrated threshold is near that of training, and spends 0.75 on the
    test split, unevenly."""
    cfg = script.Config(dataset="shapes", size="tiny", device="cpu", steps=100, batch=64, budget=0.75)
    torch.manual_seed(0)
    data, model = script.load_data(cfg), script.Model(cfg)
    script.train(model, data, cfg, script.objective)
    threshold, _ = script.calibrate(model, data.calibration, 0.75, points=2)
    x, y = (part[:1000] for part in data.test)
    result = script.evaluate(model.skipping, (x, y), threshold)
    assert result["macs"].mean() / model.dense_macs == pytest.approx(0.75, abs=0.02)
    assert threshold == pytest.approx(model.train_threshold.item(), abs=0.05)
    assert np.ptp(result["macs"]) > 0 and (result["prediction"] == y.numpy()).mean() > 0.15


def test_options_that_cannot_be(run, tmp_path):
    for options, message in ((("--experts", "0"), "at least 1"), (("--hidden", "-1"), "not negative"),
                             (("--balance", "nan"), "not negative"), (("--budget", "0.5"), "0.683"),
                             (("--budget", "nan"), "cannot be"), (("--routing", "best"), "invalid choice"),
                             (("--budget", "nan", "--routing", "top_k"), "cannot be")):
        status, _, errors = run("moe", "--dataset", "shapes", "--size", "tiny", *options, cwd=tmp_path)
        assert status == 2 and message in errors.splitlines()[-1]


def test_controls_cost_and_hold_what_they_should(run, shorten, tmp_path):
    """Dense networks of equal active MACs and of equal parameters, in log and picture."""
    shorten(script, 200)
    status, printed, errors = run("moe", "--dataset", "pydoc", "--size", "tiny", "--steps", "5",
                                  "--controls", "--device", "cpu", cwd=tmp_path)
    assert status == 0, errors[-2000:]
    meta = json.loads(str(np.load(tmp_path / "logs/pydoc-tiny/moe-s0.npz")["meta"]))
    macs, parameters = meta["controls"]["equal MACs"], meta["controls"]["equal parameters"]
    assert macs["budget"] == pytest.approx(0.7, abs=0.005)
    assert parameters["parameters"] == pytest.approx(meta["parameters"], rel=0.003)
    assert parameters["budget"] > 1 and "equal parameters" in printed
