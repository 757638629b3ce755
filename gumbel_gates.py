"""Learn what to skip: gates trained with back-propagation through the Gumbel-softmax trick.

A small gate before every block but the first computes a score z, and F, the block, the MLP of one
token or a group of neurons (`--grain`), runs or does not (its output bias is always added):

    x <- x + g * sigmoid(z) * F(x),      g = 1 if z > 0 else 0

A step has no gradient. The trick: argmax_j (s_j + Gumbel noise_j) draws j with probability
softmax(s)_j; backward it gets the gradient of softmax((s + noise) / temperature). Here s = (z, 0).

The static network trains alone first; then gates join, and their budget falls from 1 to its value.
The loss is the cross-entropy + 10 (mean MACs - budget)^2; an eighth of a batch runs with all gates
open, and does not count. Afterwards there is no noise: F runs where z > threshold.

Papers: Jang et al. 2017, Maddison et al. 2017 (the trick); Veit and Belongie 2018 (ConvNet-AIG);
Rao et al. 2021 (DynamicViT); Wang et al. 2018 (SkipNet); Raposo et al. 2024 (gate x probability).
Deviation: one budget on all MACs, not a rate for each gate. Try `--dataset shakespeare`.
"""
import argparse
import bisect
import hashlib
import itertools
import json
import math
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

SCRIPT = "gumbel_gates"
ESTIMATORS = ["gumbel", "sigmoid_st", "reinforce"]

def options(argv=None):
    """The command line, or a list of strings -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--budget", type=float, default=0.5, help="share of static MACs (default: %(default)s)")
    add("--grain", choices=["layer", "token", "group"], default="token",
        help="what a gate switches: an image's block, a token's MLP, a quarter of an image's MLPs")
    add("--estimator", choices=ESTIMATORS, default="gumbel",
        help="how gates learn: by the trick, by a sigmoid's gradient, or by trial and reward")
    cfg = parse(parser, argv)
    if not 0 < cfg.budget <= 1 or cfg.depth < 2:
        parser.error("--budget must be above 0 and at most 1, --depth at least 2")
    return cfg


# === the mechanism ===
# Shapes: B batch, T tokens, C width, H hidden neurons, L blocks with gates (all but the first), U
# gates of a block, and R rows of gates for an example: T where every token has its own, else 1.

def gumbel_softmax(scores, temperature):
    """One of k choices, drawn with the probabilities softmax(scores): (..., k) -> one-hot (..., k),
    with the gradient of the relaxed sample softmax((scores + noise) / temperature)."""
    noise = -torch.empty_like(scores).exponential_().log()      # Gumbel = -log(Exponential)
    soft = ((scores + noise) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), scores.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())            # straight through: hard, with soft's gradient

def sample_gates(z, estimator):
    """Scores z -> as many gates, 0 or 1; 1 with probability sigmoid(z), but for sigmoid_st."""
    if estimator == "gumbel":           # the difference of two Gumbels is logistic noise on z
        return gumbel_softmax(torch.stack([z, torch.zeros_like(z)], -1), temperature=1.0)[..., 0]
    p = z.sigmoid()
    if estimator == "sigmoid_st":                               # not sampled: open where p > 1/2
        return (z > 0).to(p.dtype) + (p - p.detach())
    assert estimator == "reinforce", f"{estimator!r} is none of {ESTIMATORS}"
    return torch.bernoulli(p.detach())

class Gate(nn.Module):
    """A small network: (..., C) -> scores (..., U), at first open with probability 0.87."""

    def __init__(self, width, units, hidden=16):
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, units)
        nn.init.normal_(self.out.weight, std=0.001)
        nn.init.constant_(self.out.bias, math.log(0.87 / 0.13))
        self.macs = width * hidden + hidden * units

    def forward(self, x):
        return self.out(self.hidden(x).relu())

class Model(nn.Module):
    """The static network with gates before all blocks but the first, open above the threshold."""
    cheapest, full = 1e6, -1e6          # thresholds at which only the first block runs; all do

    def __init__(self, cfg):
        super().__init__()
        self.net, self.budget, self.estimator = StaticNet(cfg), cfg.budget, cfg.estimator
        self.by_token = cfg.text or cfg.grain == "token"
        self.by_block = cfg.grain == "layer" and not cfg.text
        self.units = 4 if cfg.grain == "group" else 1
        self.gates = nn.ModuleList(Gate(cfg.width, self.units) for _ in range(cfg.depth - 1))
        self.unit_macs = self.net.block_macs if self.by_block else 8 * cfg.width ** 2 // self.units
        self.gate_macs = len(self.gates) * self.gates[0].macs           # of an example, or a token
        self.budget_weight = 10.0

    def score(self, block, gate, x):
        """x (B, T, C) before a block -> scores of its gates (B, R, U)."""
        seen = block.norm(x)
        return gate(seen if self.by_token else seen.mean(1, keepdim=True))

    def dense(self, x, threshold=None, decisions=None, opened=0):
        """Everything is computed, and multiplied by its gate -> logits, gates (L, B, R, U), scores
        alike. Without a threshold gates are sampled, but all of the first `opened` inputs open."""
        x, layers = self.net.blocks[0](self.net.embed(x)), []
        for layer, (block, gate) in enumerate(zip(self.net.blocks[1:], self.gates)):
            z = self.score(block, gate, x)
            if decisions is not None:
                gates = decisions[layer]
            elif threshold is not None:
                gates = (z > threshold).float()
            else:
                gates = sample_gates(z.float(), self.estimator)
                gates = torch.cat([torch.ones_like(z[:opened]), gates[opened:]])
            layers.append((gates, z))
            up, _, down = block.mlp
            h = up(block.mix(x)).relu().unflatten(-1, (self.units, -1))         # (B, T, U, H / U)
            factor = gates * z.sigmoid()
            x = x + block.drop(down((h * factor[..., None]).flatten(2)))
        return self.net.head(x), *(torch.stack(part) for part in zip(*layers))

    def loss(self, x, y, progress):
        """What training minimises (with reinforce it has the gradient), numbers for the bar."""
        if progress < 0.2:
            loss = F.cross_entropy(self.net(x).movedim(-1, 1), y)
            return loss, dict(loss=loss)
        n = len(x) // 8
        logits, gates, z = self.dense(x, opened=n)
        each = F.cross_entropy(logits.movedim(-1, 1), y, reduction="none")
        macs = self.count_macs(gates[:, n:])[0] / self.net.macs                 # (B - n,)
        budget = max(self.budget, 1 - (1 - self.budget) * (progress - 0.2) / 0.3)
        excess = macs.mean() - budget
        loss = each.mean() + self.budget_weight * excess.square()
        if self.estimator == "reinforce":
            with torch.no_grad():       # greedy gates are the baseline, for the loss and for MACs
                greedy, best, _ = self.dense(x[n:], 0.0)
                better = F.cross_entropy(greedy.movedim(-1, 1), y[n:], reduction="none") - each[n:]
                cheaper = self.count_macs(best)[0] / self.net.macs - macs
            advantage = (len(macs) / len(x) * better.reshape(len(macs), -1).mean(1)
                         + 2 * self.budget_weight * excess * cheaper)
            log_p = -F.binary_cross_entropy_with_logits(z[:, n:], gates[:, n:], reduction="none")
            loss = loss - (advantage.detach() * log_p.sum((0, 2, 3))).mean()
        return loss, dict(loss=each.mean(), macs=macs.mean())

    def masked(self, x, threshold=None, decisions=None):
        """Computes everything, counts what was open -> logits, macs (B,), token_macs (B, T)."""
        logits, gates, _ = self.dense(x, threshold, decisions)
        return logits, *self.count_macs(gates.long())

    def skipping(self, x, threshold):
        """What is closed is given no image, or no token -> logits, macs, token_macs."""
        x, decisions = self.net.blocks[0](self.net.embed(x)), []
        for block, gate in zip(self.net.blocks[1:], self.gates):
            z = self.score(block, gate, x)                                      # (B, R, U)
            decisions.append((z > threshold).long())
            up, _, down = block.mlp
            mixed = None if self.by_block else block.mix(x)
            parts = [each.chunk(self.units) for each in (up.weight, up.bias, down.weight.t())]
            x, before = x + down.bias, x
            z = z if self.by_token else z[:, 0]                                 # (B or B, T, U)
            for score, w1, b1, w2 in zip(z.unbind(-1), *parts):
                runs = score > threshold
                h = block.mix(before[runs]) if self.by_block else mixed[runs]   # (n or n, T, C)
                factor = score[runs].sigmoid().view(-1, *[1] * (h.ndim - 1))
                x[runs] += F.linear(h, w1, b1).relu() @ w2 * factor
        return self.net.head(x), *self.count_macs(decisions)

    def count_macs(self, decisions):
        """L times (B, R, U) of 0 and 1 -> macs (B,), token_macs (B, T); gradients pass."""
        closed = sum((1 - gates).sum(-1) for gates in decisions)                # (B, R)
        token_macs = self.net.token_macs - closed * self.unit_macs
        if self.by_token:
            token_macs = token_macs + self.gate_macs
            return self.net.example_macs + token_macs.sum(1), token_macs
        token_macs = token_macs.expand(-1, len(self.net.position))
        return self.net.example_macs + self.gate_macs + token_macs.sum(1), token_macs

def mutual_information(gates, label):
    """gates (N, G) of true and false, label (N,) -> bits (G,) that a gate tells about the label:
    H(p(open)) - sum_c p(c) H(p(open given c))."""
    def entropy(p):
        return sum(-q * np.log2(np.where(q > 0, q, 1)) for q in (p, 1 - p))

    classes, counts = np.unique(label, return_counts=True)
    p_open = np.stack([gates[label == c].mean(0) for c in classes])             # (c, G)
    return entropy(gates.mean(0)) - counts / len(label) @ entropy(p_open)

def gradient_noise(model, x, y, estimator, repeats=30):
    """Standard deviation of an estimator's gradient for the gates, over repeats on a batch, by the
    length of its mean. nan: too noisy to tell. sigmoid_st draws nothing: 0, but it is biased."""
    x, y = x[:7], y[:7].long()       # with 7 inputs no gate is opened
    model.estimator, model.budget_weight = estimator, 0.0
    losses = (model.loss(x, y, 1.0)[0] for _ in range(repeats))
    gradients = torch.stack([nn.utils.parameters_to_vector(
        torch.autograd.grad(loss, list(model.gates.parameters()))) for loss in losses])
    variance = gradients.var(0).sum()
    square = gradients.mean(0).square().sum() - variance / repeats      # the mean is noisy, too
    return round((variance / square).sqrt().item(), 2)

def main(cfg):
    log = output_path(cfg, "logs", ".npz")
    picture = output_path(cfg, "figures", ".png")
    torch.manual_seed(cfg.seed)
    data, model = load_data(cfg), Model(cfg).to(cfg.device)
    cfg.seconds = load(cfg.load, model)["seconds"] if cfg.load else train(model, data, cfg)

    threshold = calibrate(model, data["calibration"], cfg.budget)
    result = evaluate(model, model.skipping, data["test"], threshold)
    sweep, random = sweep_budgets(model, data)
    save(log, cfg, data, model, result, sweep, random=random)

    with torch.no_grad():
        gates = [model.dense(x, threshold)[1] for x in data["test"][0].split(250)]
    gates = torch.cat(gates, 1).movedim(0, 2).flatten(2).flatten(0, 1).bool().cpu().numpy()
    kind = data["test"][0 if cfg.text else 1].flatten().cpu().numpy()   # character read, or class
    shuffled = np.random.default_rng(0).permutation(kind).repeat(len(gates) // len(kind))
    kind = kind.repeat(len(gates) // len(kind))
    bits, chance = (mutual_information(gates, each).max() for each in (kind, shuffled))
    noise = {each: gradient_noise(model, *data["calibration"], each) for each in ESTIMATORS}
    axis = Figure(figsize=(12, 5), layout="constrained").subplots()
    kinds = np.bincount(kind).argsort()[::-1][:16]                  # the most frequent ones
    axis.imshow([gates[kind == k].mean(0) for k in kinds], aspect="auto", vmin=0, vmax=1)
    axis.set_yticks(range(len(kinds)), [repr(chr(k)) if cfg.text else str(k) for k in kinds])
    axis.set(title="a gate is open: never (dark) to always", xlabel="gate", ylabel="what is read",
             xticks=range(gates.shape[1]))
    axis.figure.savefig(picture, dpi=120)
    print(f"bits of the most informative gate: {bits:.3f}; labels shuffled: {chance:.3f}",
          f"noise of the gates' gradient: {noise}", f"wrote {log} and {picture}", sep="\n")


# Below: identical in every script (budgets: in four of the five); read it once.

# === shared: budgets ===
BUDGETS = (0.35, 0.5, 0.6, 0.7, 0.85)    # shares of the static network's MACs

def calibrate(model, split, budget):
    """The first of 16384 thresholds, from the cheapest to the full, that spends a budget."""
    def spend(place):
        few = [part[:2000] for part in split]    # enough for a mean
        return evaluate(model, model.masked, few, math.sinh(place))["means"]["budget"]

    grid = np.linspace(*np.arcsinh([model.cheapest, model.full]), 16384)    # sinh: finer near 0
    return math.sinh(grid[bisect.bisect_left(grid, budget, hi=16383, key=spend)])

def sweep_budgets(model, data):
    """Results at the BUDGETS in reach and in full, and means of the random control."""
    def control(x, threshold):    # decisions of another example
        decisions = model.dense(x, threshold)[1]
        return model.masked(x, decisions=[each.flip(0) for each in decisions])

    sweep, random = [], []
    for budget in tqdm([*BUDGETS, None], "sweep"):
        threshold = calibrate(model, data["calibration"], budget) if budget else model.full
        result = evaluate(model, model.skipping, data["test"], threshold)
        if not budget or abs(result["means"]["budget"] - budget) < 0.02:
            sweep.append(result)
            random.append(evaluate(model, control, data["test"], threshold)["means"])
    return sweep, random
# === end shared ===

# === shared: static network ===
class Block(nn.Module):
    """A depthwise convolution mixes tokens for the MLP. x itself is not mixed: a token that skips
    the MLP keeps its state."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.width
        self.norm = nn.LayerNorm(C)
        self.conv = nn.Conv2d(C, C, (8, 1) if cfg.text else 3, groups=C)
        self.padding = (0, 0, 7, 0) if cfg.text else (1, 1, 1, 1)    # a text: the past
        self.grid = (-1, 1) if cfg.text else (8, 8)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))
        self.drop = nn.Dropout(cfg.dropout)

    def mix(self, x):    # (B, T, C) -> the input of the MLP (B, T, C)
        h = self.norm(x)
        grid = h.unflatten(1, self.grid).permute(0, 3, 1, 2)    # (B, C, rows, columns)
        return h + self.conv(F.pad(grid, self.padding)).permute(0, 2, 3, 1).flatten(1, 2)

    def forward(self, x):
        return x + self.drop(self.mlp(self.mix(x)))

class StaticNet(nn.Module):
    """Bytes: images (B, 3, 32, 32) -> logits (B, K), text (B, T) -> logits (B, T, K)."""

    def __init__(self, cfg):
        super().__init__()
        C, self.text = cfg.width, cfg.text
        self.stem = nn.Embedding(cfg.classes, C) if cfg.text else nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, C, 3, 2, 1), nn.BatchNorm2d(C), nn.Flatten(2))
        self.position = nn.Parameter(0.02 * torch.randn(cfg.tokens, C))
        self.blocks = nn.Sequential(*(Block(cfg) for _ in range(cfg.depth)))
        self.norm = nn.LayerNorm(C)
        self.out = nn.Linear(C, cfg.classes)
        if cfg.text:    # reads and predicts characters
            self.out.weight = self.stem.weight
            nn.init.normal_(self.stem.weight, std=0.02)
        self.head_macs = C * cfg.classes
        self.block_macs = self.blocks[0].conv.weight.numel() + 8 * C * C    # of a token
        self.token_macs = cfg.depth * self.block_macs + (self.head_macs if cfg.text else 0)
        stem_macs = 16 * 16 * 9 * 3 * 16 + 8 * 8 * 9 * 16 * C
        self.example_macs = 0 if cfg.text else stem_macs + self.head_macs    # the rest
        self.macs = self.example_macs + cfg.tokens * self.token_macs

    def embed(self, x):    # -> tokens (B, T, C), 8 x 8 of an image
        x = self.stem(x.long()) if self.text else self.stem((x / 255 - 0.47) / 0.25).mT
        return x + self.position[:x.shape[1]]

    def head(self, x):
        return self.out(self.norm(x) if self.text else self.norm(x).mean(1))

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))
# === end shared ===

# === shared: options and data ===
SIZES = {   # of images, and of text
    "tiny": (dict(width=32, depth=4, batch=64, epochs=1.75, dropout=0.0, tokens=64, classes=10),
             dict(width=32, depth=4, batch=64, epochs=1, dropout=0.0, tokens=64, classes=128)),
    "small": (dict(width=48, depth=8, batch=128, epochs=16, dropout=0.0, tokens=64, classes=10),
              dict(width=72, depth=6, batch=32, epochs=10, dropout=0.1, tokens=128, classes=128)),
    "base": (dict(width=128, depth=10, batch=256, epochs=60, dropout=0.1, tokens=64, classes=10),
             dict(width=128, depth=9, batch=32, epochs=12, dropout=0.3, tokens=256, classes=128))}
CIFAR10 = ("cifar-10-binary.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
           "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
SHAKESPEARE = ("tinyshakespeare.txt", "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
               "data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")

def parse(parser, argv):    # adds what all scripts have -> namespace
    parser.usage = "%(prog)s [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--dataset", choices=["cifar10", "shakespeare", "shapes", "pydoc"], default="cifar10",
        help="the last two need no download")
    add("--size", choices=SIZES, default="base" if devices[1:] else "small",
        help="sets the next three (default: base with CUDA, else small)")
    add("--width", type=int, help="channels of a token")
    add("--depth", type=int, help="number of blocks")
    add("--epochs", type=float, help="passes over the training data")
    add("--lr", type=float, default=0.02, help="of Muon, at its peak (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, batches and noise")
    add("--device", choices=devices, default=devices[0], help="default: cuda if there is one")
    add("--data", default="data", help="folder of the data sets")
    add("--out", default=".", help="folder of logs/ and figures/")
    add("--name", default=SCRIPT, help="of this run and its files")
    add("--load", metavar="FILE", help="evaluate the .pt of an earlier run, without training")
    cfg = parser.parse_args(argv)    # then again, over what --size or --load set
    texts = ("shakespeare", "pydoc")
    known = load(cfg.load) if cfg.load else SIZES[cfg.size][cfg.dataset in texts]
    cfg = parser.parse_args(argv, argparse.Namespace(**known))
    cfg.text = cfg.dataset in texts
    for key, least in dict(width=1, depth=1, epochs=1e-3, lr=1e-6, seed=0).items():
        if not least <= getattr(cfg, key) < 1e6:
            parser.error(f"--{key} must be at least {least} and below a million")
    return cfg

def download(folder, name, url, sha256):    # -> path of a file that is the published one
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        print(f"fetching {url}; or put it at {path}, or take shapes or pydoc", file=sys.stderr)
        torch.hub.download_url_to_file(url, str(path))
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise OSError(f"{path} is not the published file; delete it and run again")
    return path

def draw_shapes(count):
    """Grey flowers with 1 to 10 lobes, which difficulty makes faint and noisy."""
    rng = np.random.default_rng(0)
    label = rng.integers(10, size=(count, 1, 1, 1), dtype=np.uint8)
    difficulty = rng.random(label.shape, np.float32) ** 1.5
    row, column = np.mgrid[-1:1:32j, -1:1:32j]
    angle = np.arctan2(row, column) + rng.uniform(0, 6.28, label.shape)
    flower = np.hypot(row, column) < 0.6 + 0.25 * np.cos((label + 1) * angle)
    noise = rng.standard_normal(flower.shape, np.float32)
    grey = 127 + 100 * (1 - 0.9 * difficulty) * flower + 40 * difficulty * noise
    images = torch.tensor(grey.clip(0, 255)).byte().expand(-1, 3, -1, -1)
    return images, torch.tensor(label.ravel()), difficulty.ravel()

def load_data(cfg):
    """{"train", "calibration", "test": (x, y)}, bytes: images (N, 3, 32, 32) and labels (N,), or
    windows (N, T) and the same, one character later; "difficulty" where it is known."""
    data, T = {}, cfg.tokens
    if cfg.dataset == "cifar10":
        folder = Path(cfg.data, "cifar-10-batches-bin")
        if not folder.exists():
            tarfile.open(download(cfg.data, *CIFAR10)).extractall(cfg.data, filter="data")
        raw = b"".join(path.read_bytes() for path in sorted(folder.glob("*.bin")))
        if len(raw) != 60000 * 3073 or max(raw[::3073]) > 9:
            raise OSError(f"{folder} is incomplete or altered; delete it and run again")
        records = torch.tensor(np.frombuffer(raw, np.uint8)).view(60000, 3073)
        x, y = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]
        ends = (45000, 50000)
    elif cfg.dataset == "shapes":
        x, y, difficulty = draw_shapes(15000)
        data["difficulty"] = difficulty[11000:]
        ends = (10000, 11000)
    elif cfg.dataset == "shakespeare":
        raw = download(cfg.data, *SHAKESPEARE).read_bytes()
    else:    # Python's manual comes along with it
        from pydoc_data.topics import topics
        raw = "".join(topics[key] for key in sorted(topics)).encode("ascii", "replace")
    if cfg.text:    # windows of train begin anywhere
        text = torch.tensor(np.frombuffer(raw, np.uint8), device=cfg.device)
        parts = text.tensor_split([int(0.95 * 0.9 * len(text)), int(0.9 * len(text))])
        windows = [part.unfold(0, T + 1, stride) for part, stride in zip(parts, (1, T, T))]
        splits = [(window[:, :-1], window[:, 1:]) for window in windows]
    else:
        splits = zip(*(part.to(cfg.device).tensor_split(ends) for part in (x, y)))
    return data | dict(zip(("train", "calibration", "test"), splits))

def training_batches(data, cfg):
    """Endless (x, y): images shifted and flipped, a text cut at other places."""
    random = dict(generator=torch.Generator(cfg.device).manual_seed(cfg.seed), device=cfg.device)
    x, y = data["train"]
    stride = cfg.tokens if cfg.text else 1
    for epoch in itertools.count():
        start = torch.randint(stride, (), **random).item()
        places = torch.arange(start, len(x), stride, device=cfg.device)
        for index in places[torch.randperm(len(places), **random)].split(cfg.batch):
            batch = x[index]
            if not cfg.text:
                padded = F.pad(batch.float(), (4, 4, 4, 4), "reflect")
                crops = padded.unfold(2, 32, 1).unfold(3, 32, 1)    # (B, 3, 9, 9, 32, 32)
                row, column = torch.randint(9, (2, len(index)), **random)
                batch = crops[torch.arange(len(index)), :, row, column]
                flip = (index + epoch) % 2 == 0
                batch[flip] = batch[flip].flip(3)
            yield batch, y[index].long()
# === end shared ===

# === shared: from training to log ===
def train(model, data, cfg):
    """Muon for the matrices of blocks, AdamW for all else -> seconds."""
    matrices = [p for p in model.net.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, cfg.lr, weight_decay=0.1 * cfg.text, adjust_lr_fn="original")
    adamw = torch.optim.AdamW(others, cfg.lr / 5, betas=(0.9, 0.99), weight_decay=0.0)
    examples = len(data["train"][0]) / (cfg.tokens if cfg.text else 1)    # windows overlap
    steps = math.ceil(cfg.epochs * examples / cfg.batch)
    bar = tqdm(zip(range(steps), training_batches(data, cfg)), f"{cfg.name}, {cfg.size}", steps)
    model.train()
    for step, (x, y) in bar:
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.device == "cuda"):
            loss, shown = model.loss(x, y, step / steps)
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min(10 * (step + 1) / steps, 1, (1 - step / steps) / 0.9)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = rate * optimizer.defaults["lr"]
            optimizer.step()
        if step % 20 == 0:    # reading a number waits for the GPU
            if not norm.isfinite():
                raise FloatingPointError(f"gradient not finite at step {step}; lower --lr")
            bar.set_postfix({key: f"{value.item():.3f}" for key, value in shown.items()})
    model.eval()
    return bar.format_dict["elapsed"]

@torch.no_grad()
def evaluate(model, run, split, threshold):
    """run, such as model.skipping, over a split -> arrays, and their means."""
    batches = []
    for x, y in zip(*(part.split(250) for part in split)):
        logits, macs, token_macs = run(x, threshold)
        loss = F.cross_entropy(logits.movedim(-1, 1), y.long(), reduction="none")
        batches.append((y, logits.argmax(-1).byte(), loss, macs, token_macs.int()))
    y, answer, loss, macs, token_macs = (torch.cat(each).cpu().numpy() for each in zip(*batches))
    means = dict(accuracy=float((y == answer).mean()), loss=float(loss.mean()),
                 budget=float(macs.mean() / model.net.macs))
    return dict(label=y, prediction=answer, correct=y == answer, loss=loss, macs=macs,
                token_macs=token_macs, threshold=threshold, means=means)

@torch.no_grad()
def wall_clock(cfg, model, x, threshold):
    """Median milliseconds of the static network and of `skipping`."""
    seconds, static = {}, StaticNet(cfg).to(cfg.device).eval()
    for _, batch, name in itertools.product(range(13), (1, 256), ("static", "skipping")):
        inputs = x[torch.randint(len(x), (batch,))]
        began = time.perf_counter()
        y = static(inputs) if name == "static" else model.skipping(inputs, threshold)[0]
        y.sum().item()    # waits for a GPU
        seconds.setdefault(f"{name}_ms_batch_{batch}", []).append(time.perf_counter() - began)
    return {key: 1000 * float(np.median(each[3:])) for key, each in seconds.items()}

def output_path(cfg, kind, suffix):    # in a folder that it makes
    path = Path(cfg.out, kind, f"{cfg.dataset}-{cfg.size}", f"{cfg.name}-s{cfg.seed}{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

def load(path, model=None):    # -> options of a run, whose weights go into the model
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
        if model:
            model.eval().load_state_dict(run["state_dict"])
        return run["options"]
    except Exception as error:    # the file can be anything
        raise OSError(f"--load {path}: {' '.join(str(error).split())[:200]}")

def save(log, cfg, data, model, result, sweep, **extra):
    """Write the weights and the log of a run (README: The log), print its means."""
    options = {key: vars(cfg)[key] for key in vars(cfg).keys() - {"data", "out", "load", "device"}}
    again = options | dict(name=f"{cfg.name}_loaded")    # so --load keeps this run's log
    torch.save(dict(options=again, state_dict=model.state_dict()), log.with_suffix(".pt"))
    test = b"".join(part.cpu().numpy().tobytes() for part in data["test"])
    meta = options | extra | dict(
        schema=3, script=SCRIPT, test_sha256=hashlib.sha256(test).hexdigest(),
        static_macs=model.net.macs, at_budget=result["means"], full=sweep[-1]["means"],
        threads=torch.get_num_threads(), torch=torch.__version__, threshold=result["threshold"],
        device=torch.cuda.get_device_name() if cfg.device == "cuda" else "CPU",
        wall_clock=wall_clock(cfg, model, data["test"][0], result["threshold"]))
    kept = ("label", "prediction", "macs", "token_macs" if cfg.text else "difficulty")
    arrays = {key: array for key, array in (result | data).items() if key in kept}
    each = (len(result["macs"]), -1)
    part = log.with_suffix(".part")    # half a log never looks like a log
    with open(part, "wb") as file:
        np.savez_compressed(
            file, **arrays, loss=np.float16(result["loss"]), meta=json.dumps(meta),
            sweep_threshold=[run["threshold"] for run in sweep],
            sweep_macs=[run["macs"] for run in sweep],
            sweep_loss=np.float16([run["loss"].reshape(each).mean(1) for run in sweep]),
            sweep_correct=np.float16([run["correct"].reshape(each).mean(1) for run in sweep]))
    part.replace(log)
    for key in ("full", "at_budget", "wall_clock"):
        print(f"{key}:", *(f"{name} {value:.4g}" for name, value in meta[key].items()))
# === end shared ===


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False    # float32 on a GPU as well
    try:
        main(options())
    except (OSError, ImportError, FloatingPointError, KeyboardInterrupt) as error:
        tqdm.write(f"{SCRIPT}.py: {str(error) or 'stopped'}", sys.stderr)
        sys.exit(2)
