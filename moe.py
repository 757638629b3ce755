"""Send each token to the experts it needs: a mixture of experts that spends unevenly.

From the second block on the MLP becomes a small shared expert, which always runs, E larger ones,
and a router. (The first, when it had experts, ran more than any other: it stays dense.)

    y = shared(x) + sum over the chosen e of w_e * expert_e(x)

Expert e runs if w_e > 0 and the threshold, one for all layers and tokens, exceeds need_e:

    top_p   w = softmax(router(x)), need_e = the sum of the weights that are larger than w_e
    top_k   the same w, need_e = the rank of e, from 0, / E: the same count for every token
    relu    w = relu(router(x)), need_e = -router(x)_e; a penalty on w, by load, meets the budget

The weights are not divided by their sum, or at k = 1 the task could not train the router. The
balance loss E * sum_e f_e P_e (f: share of all work, P: mean of w) evens the load; without it
softmax routers collapse onto a few experts, relu routers hardly. See the picture of

    python moe.py --dataset shakespeare --routing top_k --experts 8 --balance 0

Papers: Shazeer et al. 2017; Fedus et al. 2021 (Switch); Zoph et al. 2022 (ST-MoE, z-loss); Huang
et al. 2024 (top_p); Dai et al. 2024 (DeepSeekMoE, shared); Wang et al. 2024 (ReMoE, relu).
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

SCRIPT = "moe"

def options(argv=None):
    """The command line, or a list of strings -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--budget", type=float, default=0.5, help="share of static MACs (default: %(default)s)")
    add("--routing", choices=["top_p", "top_k", "relu"], default="relu", help="which experts run")
    add("--experts", type=int, default=4, help="of a layer (default: %(default)s)")
    add("--hidden", type=int, help="neurons of an expert (default: the width)")
    add("--balance", type=float, default=0.01, help="weight of the balance loss; relu: on or off")
    cfg = parse(parser, argv)
    cfg.hidden = cfg.width if cfg.hidden is None else cfg.hidden
    if not (0 < cfg.budget <= 1 and 0 < cfg.experts and 0 < cfg.hidden and 0 <= cfg.balance < 1e6):
        parser.error("--budget is in (0, 1], --experts, --hidden above 0, --balance not below 0")
    if cfg.depth < 2:
        parser.error("--depth must be at least 2, as the first block has no experts")
    return cfg


# === the mechanism ===
# Shapes: B batch, T tokens, C width, L layers of experts, E experts of each, h neurons of each.

def weigh(scores, routing):
    """Router scores (..., E) -> weights, and need: an expert runs at thresholds above it."""
    if routing == "relu":
        return scores.relu(), -scores.detach()
    p = scores.softmax(-1)
    ranked, order = p.detach().sort(dim=-1, descending=True, stable=True)
    if routing == "top_k":
        return p, order.argsort(-1).to(p) / p.shape[-1]
    assert routing == "top_p", f"{routing!r} is none of top_p, top_k, relu"
    return p, torch.zeros_like(p).scatter(-1, order, ranked.cumsum(-1) - ranked)

def balance_loss(p, chosen):
    """E * sum_e f_e P_e of Switch: p, chosen (..., N, E) -> (...), over the N tokens. f, the share
    of e in all that was chosen, has no gradient; P the mean of p: 1 for a softmax and even f."""
    f = chosen.detach().float().mean(-2)
    return p.shape[-1] * (f / f.sum(-1, keepdim=True).clamp_min(1e-9) * p.mean(-2)).sum(-1)

class Router(nn.Module):
    """x (..., C) -> scores (..., E), in float32 under autocast, too."""

    def __init__(self, width, experts):
        super().__init__()
        self.out = nn.Linear(width, experts, bias=False)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.out(x.to(self.out.weight.dtype))

class Experts(nn.Module):
    """E experts of h neurons, and a shared one of half the size, with the layer's output bias."""

    def __init__(self, width, experts, hidden):
        super().__init__()
        half = max(hidden // 2, 1)
        self.shared = nn.Sequential(nn.Linear(width, half), nn.ReLU(), nn.Linear(half, width))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width, bias=False))
            for _ in range(experts))

    def forward(self, x, weight):
        """x (..., C), weight (..., E) -> shared(x) + the weighted sum of all experts (..., C)."""
        return self.shared(x) + sum(weight[..., e, None].to(x.dtype) * expert(x)
                                    for e, expert in enumerate(self.experts))

    def dispatch(self, x, weight):
        """The same, but each expert sees only the tokens whose weight for it is not 0."""
        tokens, weight = x.flatten(0, -2), weight.flatten(0, -2)
        expert, token = weight.t().nonzero(as_tuple=True)       # sorted by expert
        counts = expert.bincount(minlength=len(self.experts)).tolist()
        y, given = self.shared(tokens), tokens.index_select(0, token)
        weight = weight[token, expert, None].to(y.dtype)
        parts = (each.split(counts) for each in (given, token, weight))
        for run, own, place, w in zip(self.experts, *parts):
            y.index_add_(0, place, w * run(own))
        return y.view_as(x)

class Model(nn.Module):
    """The static network with experts in place of every MLP but the first."""

    def __init__(self, cfg):
        super().__init__()
        self.net, self.routing, self.balance = StaticNet(cfg), cfg.routing, cfg.balance
        C, E, L = cfg.width, cfg.experts, cfg.depth - 1
        for block in self.net.blocks[1:]:
            block.mlp = Experts(C, E, cfg.hidden)
        self.routers = nn.ModuleList(Router(C, E) for _ in range(L))
        self.expert_macs = 2 * C * cfg.hidden
        fixed = C * E + 2 * C * self.net.blocks[1].mlp.shared[0].out_features - 8 * C * C
        self.fixed_macs = self.net.token_macs + L * fixed               # of a token
        ends = [self.net.example_macs + cfg.tokens * (self.fixed_macs + L * k * self.expert_macs)
                for k in (0, E)]
        k = np.interp(cfg.budget * self.net.macs, ends, (0, E))         # what the budget buys
        relu = cfg.routing == "relu"
        k = round(k) if cfg.routing == "top_k" else float(k)
        self.k = k if relu else max(1, k)       # a softmax needs an expert to learn from
        self.cheapest, self.full = (-1e6, 0.0) if relu else (0.0, 1.001)    # shared alone; w > 0
        self.register_buffer("threshold", torch.tensor(0.0 if relu else (self.k - 0.5) / E))
        self.register_buffer("penalty", torch.tensor(1e-3))             # on weights, for relu

    def dense(self, x, threshold=None, decisions=None, dispatch=False):
        """Runs all experts, or with dispatch only the chosen -> logits, and for all layers chosen,
        scores and need (L, B, T, E). threshold None: that of training."""
        x, layers = self.net.blocks[0](self.net.embed(x)), []
        threshold = self.threshold if threshold is None else threshold
        for layer, (block, router) in enumerate(zip(self.net.blocks[1:], self.routers)):
            h = block.mix(x)
            scores = router(h)
            weight, needed = weigh(scores, self.routing)
            chosen = (needed < threshold) & (weight > 0)
            if decisions is not None:           # as many experts, of least need, even if w = 0
                count = decisions[layer].sum(-1, keepdim=True)
                chosen = needed.argsort(dim=-1, stable=True).argsort(-1) < count
            chosen = chosen.to(weight.dtype)
            layers.append((chosen, scores, needed))
            run = block.mlp.dispatch if dispatch else block.mlp
            x = x + block.drop(run(h, weight * chosen))
        return self.net.head(x), *(torch.stack(part) for part in zip(*layers))

    def loss(self, x, y, progress):
        """What training minimises, and numbers for the progress bar."""
        logits, chosen, scores, needed = self.dense(x, dispatch=True)
        loss, count = F.cross_entropy(logits.movedim(-1, 1), y), chosen.sum(-1).mean()
        shown = dict(loss=loss, experts=count)
        if self.routing == "relu":
            if self.training:
                self.penalty.mul_(torch.where(count > self.k, 1.05, 1 / 1.05)).clamp_(1e-9, 1e3)
            counted = chosen if self.balance else torch.ones_like(chosen)   # then a plain L1
            used = balance_loss(scores.relu().flatten(1, 2), counted.flatten(1, 2)).mean()
            return loss + self.penalty * used, shown
        if self.training and self.routing == "top_p":
            some = needed[:, ::7]                                   # enough examples, and fast
            self.threshold.lerp_(some.quantile(self.k / some.shape[-1]), 0.1)
        p, log_p = scores.softmax(-1), scores.log_softmax(-1)
        balance = balance_loss(p.flatten(1, 2), chosen.flatten(1, 2)).mean()
        small = scores.logsumexp(-1).square().mean()                # keeps scores small
        entropy = -(p * log_p).sum(-1).mean()                       # keeps the router decided
        return loss + self.balance * balance + 1e-3 * small + 1e-4 * entropy, shown

    def masked(self, x, threshold=None, decisions=None):
        """Computes everything, counts what was chosen -> logits, macs (B,), token_macs (B, T)."""
        logits, chosen, _, _ = self.dense(x, threshold, decisions)
        return logits, *self.count_macs(chosen)

    def skipping(self, x, threshold):
        """Every expert is given its own tokens and no others -> logits, macs, token_macs."""
        logits, chosen, _, _ = self.dense(x, threshold, dispatch=True)
        return logits, *self.count_macs(chosen)

    def count_macs(self, decisions):
        """Chosen experts, L times (B, T, E) of 0 and 1 -> macs (B,), token_macs (B, T)."""
        count = sum(chosen.sum(-1) for chosen in decisions).long()
        token_macs = self.fixed_macs + count * self.expert_macs
        return self.net.example_macs + token_macs.sum(1), token_macs

def specialisation(chosen, kind):
    """chosen (L, N T, E), kind (N T,) -> mutual information of expert and kind, bits (L,)."""
    both = np.stack([chosen[:, kind == each].sum(1) for each in np.unique(kind)])   # (kinds, L, E)
    both = both / np.maximum(both.sum((0, 2), keepdims=True), 1e-9)
    apart = both.sum(0, keepdims=True) * both.sum(2, keepdims=True)
    ratio = np.where(both > 0, both / np.maximum(apart, 1e-30), 1)
    return (both * np.log2(ratio)).sum((0, 2)).round(3)

def main(cfg):
    log = output_path(cfg, "logs", ".npz")
    picture = output_path(cfg, "figures", ".png")
    torch.manual_seed(cfg.seed)
    data, model = load_data(cfg), Model(cfg).to(cfg.device)
    cfg.seconds = load(cfg.load, model)["seconds"] if cfg.load else train(model, data, cfg)

    threshold = calibrate(model, data["calibration"], cfg.budget)
    if cfg.routing == "top_k":      # a whole number of experts: that of training
        threshold = model.threshold.item()
    result = evaluate(model, model.skipping, data["test"], threshold)
    sweep, random = sweep_budgets(model, data)
    save(log, cfg, data, model, result, sweep, random=random)

    x, y = data["test"]
    with torch.no_grad():
        chosen = [model.dense(some, threshold)[1].bool().cpu() for some in x.split(250)]
    chosen = torch.cat(chosen, 1).flatten(1, 2).numpy()             # (L, N T, E)
    kind = (x.flatten() if cfg.text else y).cpu().numpy()           # characters read, or classes
    shuffled, tokens = np.random.default_rng(0).permutation(kind), chosen.shape[1] // len(kind)
    bits, by_chance = (specialisation(chosen, each.repeat(tokens)) for each in (kind, shuffled))
    dead = (~chosen.any(1)).sum()
    kinds = np.bincount(kind).argsort()[::-1][:16]                  # the most frequent ones
    share = [chosen[:, kind.repeat(tokens) == k].mean(1).ravel() for k in kinds]    # (kinds, L E)
    axis = Figure(figsize=(12, 5), layout="constrained").subplots()
    axis.figure.colorbar(axis.imshow(share, aspect="auto", vmin=0))
    axis.set_xticks(range(0, len(share[0]), cfg.experts), range(1, cfg.depth))
    axis.set_yticks(range(len(kinds)), [repr(chr(k)) if cfg.text else str(k) for k in kinds])
    axis.set(title="share of tokens that an expert runs", ylabel="class, or character read",
             xlabel="block, and in it expert by expert")
    axis.figure.savefig(picture, dpi=120)
    print(f"bits that an expert tells about the class or character: {bits}; shuffled: {by_chance}")
    print(f"dead experts: {dead} of {len(share[0])}; wrote {log} and {picture}")


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
