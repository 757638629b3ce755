"""Send each token to the experts it needs: a mixture of experts that spends unevenly.

The MLP of a block becomes a small shared expert, which always runs, E larger ones, and a router:

    y = shared(x) + sum over the chosen e of w_e * expert_e(x)

Together the experts are larger than the MLP they replace; a token pays for those it runs. Expert e
runs if need_e < threshold, one number for all layers and tokens, and w_e > 0. By `--routing`:

    top_p   w = softmax(router(x)), need = the weights of all experts ahead of e
    top_k   the same w, need = the rank of e / E: as many experts for every token
    relu    w = relu(router(x)), need = -router(x): experts of weight 0 need not run. A penalty on
            w, weighted by load, grows or falls until as many run as the budget buys

The weights w are not divided by their sum: with one expert w would be 1 whatever the router says,
and the task could not train it. Left alone routers collapse: an expert that is used learns and is
used more. The balance loss E * sum_e f_e P_e (f: share of all work done by e, P: mean of w) evens
the load; `--balance 0` shows the collapse. No token is dropped, nothing depends on the rest of a
batch. The random control deals out counts; which experts run stays the router's choice.

    python moe.py                                            # CIFAR-10
    python moe.py --dataset shakespeare                      # characters

Papers: Shazeer et al. 2017; Fedus et al. 2021 (Switch); Zoph et al. 2022 (ST-MoE, z-loss); Huang
et al. 2024 (top_p); Dai et al. 2024 (DeepSeekMoE, shared); Wang et al. 2024 (ReMoE, relu).
"""
import argparse
import bisect
import functools
import hashlib
import itertools
import json
import math
import os
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
    parser = shared_options(__doc__)
    add = parser.add_argument
    add("--budget", type=float, default=0.5, help="mean MACs, as a share of the static network's")
    add("--routing", choices=["top_p", "top_k", "relu"], default="relu",
        help="which experts a token runs")
    add("--experts", type=int, default=8, help="that a router chooses from, in each layer")
    add("--hidden", type=int, help="neurons of an expert (default: the width)")
    add("--balance", type=float, default=0.01, help="weight of the balance loss; relu: 0 or not")
    cfg = complete(parser, argv)
    cfg.hidden = cfg.width if cfg.hidden is None else cfg.hidden
    if not (0 < cfg.budget <= 1 and 0 < cfg.experts and 0 < cfg.hidden and 0 <= cfg.balance < 1e6):
        parser.error("--budget, --experts and --hidden must be above 0, --budget at most 1, "
                     "--balance not negative")
    return cfg


# Shapes: B batch, T tokens, C width, L blocks, E experts, h neurons of each.

# === the mechanism ===
def weigh(scores, routing):
    """Router scores (..., E) -> weights of the experts, and need, alike: the threshold above which
    an expert runs, without a gradient."""
    if routing == "relu":
        return scores.relu(), -scores.detach()
    p = scores.softmax(-1)
    ranked, order = p.detach().sort(dim=-1, descending=True, stable=True)
    if routing == "top_k":
        return p, order.argsort(-1).to(p) / p.shape[-1]
    if routing == "top_p":
        return p, torch.zeros_like(p).scatter(-1, order, ranked.cumsum(-1) - ranked)
    raise ValueError(f"routing {routing!r} is none of top_p, top_k, relu")


def threshold_for(needed, k):
    """needed (..., E) -> the threshold at which a token runs k experts on average."""
    count = round(k * needed[..., 0].numel())
    if count >= needed.numel():
        return needed.new_tensor(1.001)             # above all
    return needed.flatten().kthvalue(count + 1).values


def balance_loss(p, chosen):
    """E * sum_e f_e P_e of Switch: p, chosen (..., N, E) -> (...), over the N tokens. f, the share
    of e in all that was chosen, has no gradient; P is the mean of p. Where f is even: 1."""
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
    """E experts of h neurons each; and a shared one of half the size, which always runs, and whose
    output bias is the layer's."""

    def __init__(self, width, experts, hidden):
        super().__init__()
        half = max(hidden // 2, 1)
        self.shared = nn.Sequential(nn.Linear(width, half), nn.ReLU(), nn.Linear(half, width))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width, bias=False))
            for _ in range(experts))

    def forward(self, x, weight):
        """x (..., C), weight (..., E) -> the weighted sum of all experts' outputs (..., C)."""
        return self.shared(x) + sum(weight[..., e, None].to(x.dtype) * expert(x)
                                    for e, expert in enumerate(self.experts))

    def dispatch(self, x, weight):
        """The same, at the cost of the experts whose weight is not 0: each is given its tokens, and
        its answers are added up where they came from."""
        tokens, weight = x.flatten(0, -2), weight.flatten(0, -2).t()            # (N, C), (E, N)
        y = self.shared(tokens)
        for w, expert in zip(weight, self.experts):
            chosen = w.nonzero().squeeze(-1)
            answers = expert(tokens[chosen]) * w[chosen, None]
            y = y.index_add(0, chosen, answers.to(y.dtype))
        return y.view_as(x)


class Model(nn.Module):
    """The static network with experts in place of every MLP. The shared one always runs, another
    where its need is below the threshold and its weight above 0."""

    def __init__(self, cfg):
        super().__init__()
        self.net, self.routing, self.balance = StaticNet(cfg), cfg.routing, cfg.balance
        C, E, L = cfg.width, cfg.experts, cfg.depth
        for block in self.net.blocks:
            block.mlp = Experts(C, E, cfg.hidden)
        self.routers = nn.ModuleList(Router(C, E) for _ in range(L))
        self.expert_macs = 2 * C * cfg.hidden
        fixed = C * E + 2 * C * self.net.blocks[0].mlp.shared[0].out_features - 8 * C * C
        self.fixed_macs = self.net.token_macs + L * fixed               # of a token
        ends = [self.net.example_macs + cfg.tokens * (self.fixed_macs + L * k * self.expert_macs)
                for k in (0, E)]
        k = np.interp(cfg.budget * self.net.macs, ends, (0, E))         # what the budget buys
        relu = cfg.routing == "relu"
        self.k = float(k) if relu else max(1, round(k) if cfg.routing == "top_k" else float(k))
        self.cheapest, self.full = (-1e9, 0.0) if relu else (0.0, 1.001)    # shared alone, and all
        self.register_buffer("threshold", torch.tensor(0.0 if relu else self.k / E))
        self.register_buffer("penalty", torch.tensor(1e-3))             # on weights, for relu

    def all_experts(self, x, threshold=None, decisions=None, dispatch=False):
        """Everything is computed, or by dispatch only what is chosen -> logits, and of all layers
        scores, need and chosen (L, B, T, E). threshold None: that of training."""
        x, layers = self.net.embed(x), []
        threshold = self.threshold if threshold is None else threshold
        for layer, (block, router) in enumerate(zip(self.net.blocks, self.routers)):
            h = block.mix(x)
            scores = router(h)
            weight, needed = weigh(scores, self.routing)
            chosen = (needed < threshold) & (weight > 0)
            if decisions is not None:           # as many experts, those that the router prefers
                count = decisions[layer].sum(-1, keepdim=True)
                chosen = needed.argsort(dim=-1, stable=True).argsort(-1) < count
            chosen = chosen.to(weight.dtype)
            layers.append((scores, needed, chosen))
            run = block.mlp.dispatch if dispatch else block.mlp
            x = x + block.drop(run(h, weight * chosen))
        return self.net.head(x), *(torch.stack(part) for part in zip(*layers))

    def dense(self, x, threshold=None, decisions=None):
        """x -> logits, chosen (L, B, T, E)."""
        logits, _, _, chosen = self.all_experts(x, threshold, decisions)
        return logits, chosen

    def loss(self, x, y, progress):
        """What training minimises, and numbers for the progress bar."""
        logits, scores, needed, chosen = self.all_experts(x, dispatch=True)
        loss, run = F.cross_entropy(logits.movedim(-1, 1), y), chosen.sum(-1).mean()
        shown = dict(loss=loss, accuracy=(logits.argmax(-1) == y).float().mean(), experts=run)
        if self.routing == "relu":
            if self.training:
                self.penalty.mul_(torch.where(run > self.k, 1.05, 1 / 1.05)).clamp_(1e-9, 1e3)
            counted = chosen if self.balance else torch.ones_like(chosen)   # or all alike
            used = balance_loss(scores.relu().flatten(1, 2), counted.flatten(1, 2)).mean()
            return loss + self.penalty * used, shown
        if self.training:
            self.threshold.lerp_(threshold_for(needed, self.k), 0.1)
        p, log_p = scores.softmax(-1), scores.log_softmax(-1)
        balance = balance_loss(p.flatten(1, 2), chosen.flatten(1, 2)).mean()
        small = scores.logsumexp(-1).square().mean()                # keeps scores small
        entropy = -(p * log_p).sum(-1).mean()                       # keeps the router decided
        return loss + self.balance * balance + 1e-3 * small + 1e-4 * entropy, shown

    def masked(self, x, threshold):
        """Computes everything, counts what was chosen -> logits, macs (B,), token_macs (B, T)."""
        logits, chosen = self.dense(x, threshold)
        return logits, *self.count_macs(chosen.long())

    def skipping(self, x, threshold):
        """Every expert is given its own tokens and no others -> logits, macs, token_macs."""
        logits, _, _, chosen = self.all_experts(x, threshold, dispatch=True)
        return logits, *self.count_macs(chosen.long())

    def count_macs(self, decisions):
        """Chosen experts, L times (B, T, E) of 0 and 1 -> macs (B,), token_macs (B, T)."""
        count = sum(chosen.sum(-1) for chosen in decisions)
        token_macs = self.fixed_macs + count * self.expert_macs
        return self.net.example_macs + token_macs.sum(1), token_macs


@torch.no_grad()
def expert_use(model, split, threshold, kind):
    """How often tokens of each kind run each expert: kind (N T,) -> (kinds, L, E), in order."""
    chosen = [model.dense(network_input(x), threshold)[1].flatten(1, 2)
              for x in split[0].split(250)]
    chosen = torch.cat(chosen, 1).cpu().numpy()                                 # (L, N T, E)
    return np.stack([chosen[:, kind == each].mean(1) for each in np.unique(kind)])


def specialisation(use, counts):
    """use (kinds, L, E), counts (kinds,) of tokens -> bits (L,) that the name of an expert tells
    about the kind of a token that it runs: the mutual information of both."""
    both = use * counts[:, None, None]
    both = both / np.maximum(both.sum((0, 2), keepdims=True), 1e-9)
    apart = both.sum(0, keepdims=True) * both.sum(2, keepdims=True)
    return (both * np.log2(np.where(both > 0, both / np.maximum(apart, 1e-30), 1))).sum((0, 2))


def main(cfg):
    log, picture = output_paths(cfg)
    torch.manual_seed(cfg.seed)
    data, model = load_data(cfg), Model(cfg).to(cfg.device)
    seconds = load(cfg.load, model)[1] if cfg.load else train(model, data, cfg)

    threshold, thresholds = calibrate(model, data["calibration"], cfg.budget)
    result = evaluate(model.skipping, data["test"], threshold)
    sweep, random = {}, []
    for budget, each in tqdm(thresholds.items(), "sweep"):
        sweep[budget] = evaluate(model.skipping, data["test"], each)
        random.append(summary(model, evaluate_random(model, data["test"], each)))
    clock = wall_clock(cfg, model, data["test"][0], threshold)
    means = save(log, cfg, data, model, seconds, result, sweep, wall_clock=clock, random=random)

    x, y = (part.cpu().numpy() for part in data["test"])
    kind = x.flatten() if cfg.text else y.repeat(cfg.tokens)        # a character read, or a class
    use = expert_use(model, data["test"], threshold, kind)
    shuffled = np.random.default_rng(0).permutation(kind if cfg.text else y)
    chance = expert_use(model, data["test"], threshold, shuffled.repeat(len(kind) // len(shuffled)))
    counts = np.unique(kind, return_counts=True)[1]
    load_of = np.einsum("kle,k->le", use, counts)
    load_of = load_of / np.maximum(load_of.sum(1, keepdims=True), 1)        # shares of the work
    figure, free = draw(cfg, data, model, result, sweep, random)
    loads, kinds = free.subplots(1, 2)
    for axis, image in ((loads, load_of), (kinds, use.reshape(len(use), -1))):
        free.colorbar(axis.imshow(image, aspect="auto", vmin=0), ax=axis)
    loads.set(title="share of a layer's work", xlabel="expert", ylabel="layer",
              yticks=range(cfg.depth))
    kinds.set(title="how often it runs, by class or character", xlabel="expert of each layer")
    figure.savefig(picture, dpi=120)
    print(*means, sep="\n")
    print("effective number of experts by layer:",
          *(f"{each:.1f}" for each in load_of.any(1) / np.maximum(np.square(load_of).sum(1), 1e-9)))
    print(f"dead experts: {(load_of == 0).sum()} of {load_of.size}")
    print("bits that an expert tells about the class or character, by layer:",
          *(f"{each:.3f}" for each in specialisation(use, counts)), "; shuffled:",
          *(f"{each:.3f}" for each in specialisation(chance, counts)))
    print(f"wrote {log} and {picture}")


# Below: identical in all five scripts; read it once.

# === shared: static network ===
class Block(nn.Module):
    """Pre-norm residual block: a depthwise convolution mixes the tokens, 3 x 3 of them on images,
    the last `cfg.kernel` characters on text; then each token runs through the MLP. The residual
    stream x itself is not mixed: a token that skips the MLP keeps its state."""

    def __init__(self, cfg):
        super().__init__()
        C, k = cfg.width, cfg.kernel
        self.norm = nn.LayerNorm(C)
        self.conv = nn.Conv2d(C, C, (k, 1) if cfg.text else k, groups=C)
        self.grid = (-1, 1) if cfg.text else (8, 8)
        self.padding = (0, 0, k - 1, 0) if cfg.text else (k // 2,) * 4    # a text: the past only
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))
        self.drop = nn.Dropout(cfg.dropout)

    def mix(self, x):
        """x (B, T, C) -> the input of the MLP (B, T, C)."""
        h = self.norm(x)
        grid = h.unflatten(1, self.grid).permute(0, 3, 1, 2)    # (B, C, rows, columns)
        return h + self.conv(F.pad(grid, self.padding)).permute(0, 2, 3, 1).flatten(1, 2)

    def forward(self, x):
        return x + self.drop(self.mlp(self.mix(x)))


class StaticNet(nn.Module):
    """Images (B, 3, 32, 32) -> 8 x 8 tokens -> logits (B, K); text (B, T) -> logits (B, T, K)."""

    def __init__(self, cfg):
        super().__init__()
        C, S, self.text = cfg.width, 16, cfg.text
        self.stem = nn.Embedding(cfg.classes, C) if cfg.text else nn.Sequential(
            nn.Conv2d(3, S, 3, 2, 1), nn.BatchNorm2d(S), nn.ReLU(),
            nn.Conv2d(S, C, 3, 2, 1), nn.BatchNorm2d(C))
        self.position = nn.Parameter(0.02 * torch.randn(cfg.tokens, C))
        self.blocks = nn.Sequential(*(Block(cfg) for _ in range(cfg.depth)))
        self.norm = nn.LayerNorm(C)
        self.out = nn.Linear(C, cfg.classes)
        if cfg.text:    # one matrix reads characters and predicts them
            self.out.weight = self.stem.weight
            nn.init.normal_(self.stem.weight, std=0.02)
        self.head_macs = C * cfg.classes
        self.block_macs = self.blocks[0].conv.weight.numel() + 8 * C * C    # of a token
        self.token_macs = cfg.depth * self.block_macs + (self.head_macs if cfg.text else 0)
        stem_macs = 16 * 16 * 9 * 3 * S + 8 * 8 * 9 * S * C
        self.example_macs = 0 if cfg.text else stem_macs + self.head_macs   # not those of tokens
        self.macs = self.example_macs + cfg.tokens * self.token_macs

    def embed(self, x):
        """x -> tokens (B, T, C)."""
        x = self.stem(x) if self.text else self.stem(x).flatten(2).transpose(1, 2)
        return x + self.position[:x.shape[1]]

    def head(self, x):
        """tokens (B, T, C) -> logits."""
        return self.out(self.norm(x) if self.text else self.norm(x).mean(1))

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))
# === end shared ===


# === shared: data ===
CIFAR10 = ("cifar-10-binary.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
           "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
SHAKESPEARE = ("tinyshakespeare.txt", "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
               "data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


def download(folder, name, url, sha256):
    """The path of a published file, fetched unless the folder has it, checked every time."""
    path = Path(folder, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            torch.hub.download_url_to_file(url, str(path), sha256)    # the whole file, or none
    except Exception as error:
        raise OSError(f"{url}: {error}; put it at {path} by hand, or take --dataset shapes, pydoc")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise OSError(f"{path} is not the published file; delete it and run again")
    return path


def read_cifar10(folder):
    """Images (60000, 3, 32, 32) and labels (60000,), the test split last; unpacks the archive."""
    unpacked = Path(folder, "cifar-10-batches-bin")
    if not unpacked.exists():
        tarfile.open(download(folder, *CIFAR10)).extractall(folder, filter="data")
    raw = b"".join(path.read_bytes() for path in sorted(unpacked.glob("*.bin")))
    if len(raw) != 60000 * 3073 or max(raw[::3073]) > 9:
        raise OSError(f"{unpacked} is incomplete or altered; delete it and run again")
    records = np.frombuffer(raw, np.uint8).reshape(60000, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def draw_shapes(count):
    """Flowers with 0, 2, 3, 4 or 5 lobes, full or hollow; difficulty fades them, and adds noise."""
    rng = np.random.default_rng(0)
    labels, difficulty = rng.integers(10, size=count, dtype=np.uint8), rng.random(count) ** 1.5
    images = np.empty((count, 3, 32, 32), np.uint8)
    row, column = np.mgrid[-1:1:32j, -1:1:32j]
    for image, label, d in zip(images, labels, difficulty):
        left, up, size, turn = rng.uniform((-0.2, -0.2, 0.6, 0), (0.2, 0.2, 0.9, 6.28))
        x, y, lobes = (column - left) / size, (row - up) / size, (0, 2, 3, 4, 5)[label // 2]
        edge = np.hypot(x, y) - 0.7 - 0.3 * np.cos(lobes * np.arctan2(y, x) + turn)
        flower = np.clip(0.5 - 8 * (abs(edge) - 0.15 if label % 2 else edge), 0, 1)
        colour = rng.uniform(0.4, 0.8, (3, 1, 1)) * rng.choice((-1, 1), (3, 1, 1))
        noise = 0.15 * d * rng.standard_normal((3, 32, 32))
        image[:] = 255 * np.clip(0.5 + (1 - 0.9 * d) * flower * colour + noise, 0, 1)
    return images, labels, difficulty.astype(np.float32)


def load_data(cfg):
    """{"train", "calibration", "test": (x, y)}, bytes on the device: images (N, 3, 32, 32), (N,) or
    windows (N, T) and the same, one character later; "difficulty" where it is known."""
    data = {}
    if cfg.dataset == "cifar10":
        x, y = read_cifar10(cfg.data)
        ends = (45000, 50000)
    elif cfg.dataset == "shapes":
        x, y, difficulty = draw_shapes(15000)
        ends = (10000, 11000)
        data["difficulty"] = difficulty[11000:]
    elif cfg.dataset == "shakespeare":
        raw = download(cfg.data, *SHAKESPEARE).read_bytes()
    else:    # Python's manual comes along with it
        from pydoc_data.topics import topics
        raw = "".join(topics[key] for key in sorted(topics)).encode("ascii", "replace")
    if cfg.text:
        text = torch.tensor(np.frombuffer(raw, np.uint8), device=cfg.device)
        parts = text.tensor_split([int(0.95 * 0.9 * len(text)), int(0.9 * len(text))])
        strides = (1, cfg.tokens, cfg.tokens)    # windows of train begin anywhere
        windows = [part.unfold(0, cfg.tokens + 1, step) for part, step in zip(parts, strides)]
        splits = [(window[:, :-1], window[:, 1:]) for window in windows]
    else:
        x, y = torch.tensor(x, device=cfg.device), torch.tensor(y, device=cfg.device)
        splits = zip(x.tensor_split(ends), y.tensor_split(ends))
    return data | dict(zip(("train", "calibration", "test"), splits))


def network_input(x):
    """Bytes -> normalised images, or int64 characters."""
    return (x.float() / 255 - 0.47) / 0.25 if x.ndim == 4 else x.long()


def training_batches(data, cfg):
    """Endless (x, y), each epoch in a new order: images flipped every other epoch and shifted by up
    to 4 pixels, windows of a text cut at other places, without overlap."""
    random = dict(generator=torch.Generator(cfg.device).manual_seed(cfg.seed), device=cfg.device)
    x, y = data["train"]
    stride = cfg.tokens if cfg.text else 1
    for epoch in itertools.count():
        start = torch.randint(stride, (), **random).item()
        places = torch.arange(start, len(x), stride, device=cfg.device)
        for index in places[torch.randperm(len(places), **random)].split(cfg.batch):
            batch, B = network_input(x[index]), len(index)
            if not cfg.text:
                padded = F.pad(batch, (4, 4, 4, 4), "reflect")
                crops = padded.unfold(2, 32, 1).unfold(3, 32, 1)    # (B, 3, 9, 9, 32, 32)
                row, column = torch.randint(9, (2, B), **random)
                batch = crops[torch.arange(B), :, row, column]
                flip = (index + epoch) % 2 == 0
                batch[flip] = batch[flip].flip(3)
            yield batch, y[index].long()
# === end shared ===


# === shared: options ===
SIZES = {   # for images, and for text
    "tiny": (dict(width=32, depth=3, batch=64, epochs=3, dropout=0.0, tokens=64, kernel=3),
             dict(width=32, depth=2, batch=64, epochs=1, dropout=0.0, tokens=64, kernel=8)),
    "small": (dict(width=48, depth=8, batch=128, epochs=16, dropout=0.0, tokens=64, kernel=3),
              dict(width=72, depth=6, batch=32, epochs=10, dropout=0.1, tokens=128, kernel=8)),
    "base": (dict(width=128, depth=10, batch=256, epochs=60, dropout=0.1, tokens=64, kernel=3),
             dict(width=384, depth=9, batch=64, epochs=20, dropout=0.2, tokens=256, kernel=8))}


def shared_options(doc):
    """A parser that knows the options of all scripts."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", "%(prog)s [options]", doc, formatter_class=raw)
    add = parser.add_argument_group("options of all scripts").add_argument
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add("--dataset", choices=["cifar10", "shakespeare", "shapes", "pydoc"], default="cifar10",
        help="the last two need no download (default: cifar10)")
    add("--size", choices=list(SIZES), help="of the network (default: base on CUDA, else small)")
    add("--width", type=int, help="channels of a token (default: by --size, like the next three)")
    add("--depth", type=int, help="number of blocks")
    add("--batch", type=int, help="examples per training step")
    add("--epochs", type=float, help="passes over the training data")
    add("--steps", type=int, help="training steps, instead of --epochs")
    add("--lr", type=float, default=0.02, help="peak learning rate of Muon; AdamW has a fifth")
    add("--seed", type=int, default=0, help="of weights, batches and noise (default: 0)")
    add("--device", choices=devices, default=devices[-1], help="default: cuda where there is one")
    add("--bf16", action=argparse.BooleanOptionalAction, help="train in bfloat16 (default: CUDA)")
    add("--data", default="data", help="folder of the data sets, filled by downloads")
    add("--out", default=".", help="folder that gets logs/ and figures/")
    add("--name", default=SCRIPT, help="of this run, in its log and file names")
    add("--load", metavar="FILE", help="evaluate the .pt of an earlier run, under another --name")
    return parser


def complete(parser, argv):
    """Parse, fill in the options that depend on others, and check them -> namespace."""
    cfg = parser.parse_args(argv)
    if cfg.load:
        options, _ = load(cfg.load)
        cfg = parser.parse_args(argv, argparse.Namespace(**options))
        for key in options.keys() - {"budget", "criterion", "risk"}:    # not of the training
            if getattr(cfg, key) != options[key]:
                parser.error(f"--load {cfg.load}: leave out --{key.replace('_', '-')}")
    cfg.size = cfg.size or ("base" if cfg.device == "cuda" else "small")
    cfg.bf16 = cfg.device == "cuda" if cfg.bf16 is None else cfg.bf16
    cfg.text = cfg.dataset in ("shakespeare", "pydoc")
    cfg.classes = 128 if cfg.text else 10
    for key, default in SIZES[cfg.size][cfg.text].items():
        if getattr(cfg, key, None) is None:
            setattr(cfg, key, default)
    for key in ("width", "depth", "batch", "epochs", "steps", "lr", "seed"):
        value, least = getattr(cfg, key), -1 if key == "seed" else 0
        if value is not None and not least < value < 1e6:
            parser.error(f"--{key} {value} must be above {least} and below a million")
    return cfg
# === end shared ===


# === shared: training ===
def train(model, data, cfg):
    """Muon for the matrices of blocks, AdamW for all else; their rates rise linearly for a tenth of
    the steps, then fall linearly to 0. -> seconds."""
    matrices = [p for p in model.net.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    decay = 0.1 if cfg.text else 0.0    # a text is short, and read many times
    optimizers = [torch.optim.Muon(matrices, cfg.lr, weight_decay=decay, adjust_lr_fn="original"),
                  torch.optim.AdamW(others, cfg.lr / 5, betas=(0.9, 0.99), weight_decay=0.0)]
    examples = len(data["train"][0]) / (cfg.tokens if cfg.text else 1)    # windows overlap
    steps = cfg.steps or math.ceil(cfg.epochs * examples / cfg.batch)
    model.train()
    began = time.perf_counter()
    bar = tqdm(zip(range(steps), training_batches(data, cfg)), f"{cfg.name}, {cfg.size}", steps)
    for step, (x, y) in bar:
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16):
            loss, shown = model.loss(x, y, step / steps)
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min(10 * (step + 1) / steps, 1, (1 - step / steps) / 0.9)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * optimizer.defaults["lr"]
            optimizer.step()
        if step % 20 == 0 or step == steps - 1:    # reading a number waits for the GPU
            if not norm.isfinite():
                raise FloatingPointError(f"gradient not finite at step {step}; try a smaller --lr")
            bar.set_postfix({key: f"{value.item():.3f}" for key, value in shown.items()})
    model.eval()
    return time.perf_counter() - began
# === end shared ===


# === shared: evaluation ===
BUDGETS = (0.35, 0.5, 0.6, 0.7, 0.85)    # mean MACs, as shares of the static network's


@torch.no_grad()
def evaluate(run, split, threshold):
    """run (model.masked or model.skipping) over a split -> arrays: label, prediction and loss in
    nats, all shaped like y, macs (N,), token_macs (N, T); and the threshold."""
    batches = []
    for x, y in zip(split[0].split(250), split[1].split(250)):
        logits, macs, token_macs = run(network_input(x), threshold)
        loss = F.cross_entropy(logits.movedim(-1, 1), y.long(), reduction="none")
        batches.append(dict(label=y, prediction=logits.argmax(-1).byte(), loss=loss, macs=macs,
                            token_macs=token_macs.int()))
    arrays = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    return {key: array.cpu().numpy() for key, array in arrays.items()} | dict(threshold=threshold)


def summary(model, result):
    """Means of what `evaluate` returned."""
    return dict(accuracy=float((result["prediction"] == result["label"]).mean()),
                loss=float(result["loss"].mean()),
                budget=float(result["macs"].mean() / model.net.macs))


def evaluate_random(model, split, threshold):
    """The control: `evaluate` with the decisions of `masked` shuffled among the examples or tokens
    of a batch; rates and MACs stay the same."""
    def run(x, threshold):
        _, decisions = model.dense(x, threshold)
        rows = decisions[0].shape[:2]    # (B,), or (B, T); all layers alike
        order = torch.randperm(math.prod(rows), generator=torch.Generator().manual_seed(0))
        decisions = [(d != 0).long().flatten(0, len(rows) - 1)[order].view_as(d) for d in decisions]
        logits, ran = model.dense(x, decisions=decisions)
        return logits, *model.count_macs([(d != 0).long() for d in ran])

    return evaluate(run, split, threshold)


def calibrate(model, split, budget=1.0):
    """The threshold nearest to a budget; {budget: threshold} for BUDGETS in reach, full last."""
    ends = np.arcsinh([model.cheapest, model.full])    # about even steps, growing if ends are far
    grid = np.sinh(np.linspace(*ends, 2 ** 14 + 1)).tolist()

    @functools.cache
    def spent(threshold):
        few = [part[:2000] for part in split]    # enough to estimate a mean
        return summary(model, evaluate(model.masked, few, threshold))["budget"]

    def nearest(wanted):
        i = bisect.bisect_left(grid, wanted, 1, len(grid) - 1, key=spent)
        return grid[i] if spent(grid[i]) - wanted < wanted - spent(grid[i - 1]) else grid[i - 1]

    least, most = spent(grid[0]), spent(grid[-1])
    reached = [each for each in BUDGETS if least <= each <= most]
    if budget < least:
        tqdm.write(f"a budget of {budget} is out of reach; {least:.3f} is the least", sys.stderr)
    found = {each: nearest(each) for each in tqdm(reached, "calibrate")}
    return nearest(budget), found | {most: model.full}


@torch.no_grad()
def wall_clock(cfg, model, x, threshold):
    """Median milliseconds of the static network and of `skipping`, batches of 1 and of 256."""
    seconds, static = {}, StaticNet(cfg).to(cfg.device).eval()
    for batch, i in itertools.product((1, 256), range(23)):
        inputs = network_input(x[torch.arange(i * batch, (i + 1) * batch) % len(x)])
        for name in ("static", "skipping"):
            inputs.sum().item()    # waits for a GPU
            began = time.perf_counter()
            y = static(inputs) if name == "static" else model.skipping(inputs, threshold)[0]
            y.sum().item()
            each = seconds.setdefault(f"{name}_ms_batch_{batch}", [])
            each.append(time.perf_counter() - began)
    return {key: 1000 * float(np.median(each[3:])) for key, each in seconds.items()}
# === end shared ===


# === shared: log and picture ===
def output_paths(cfg):
    """The paths of the log and the picture of a run, in folders that are made."""
    run = f"{cfg.dataset}-{cfg.size}/{cfg.name}-s{cfg.seed}"
    log, picture = Path(cfg.out, f"logs/{run}.npz"), Path(cfg.out, f"figures/{run}.png")
    if cfg.load and log.exists():
        raise FileExistsError(f"--load would overwrite {log}: choose another --name")
    log.parent.mkdir(parents=True, exist_ok=True)
    picture.parent.mkdir(parents=True, exist_ok=True)
    return log, picture


def load(path, model=None):
    """Options and seconds of an earlier run, whose weights go into the model."""
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
        if model is not None:
            model.load_state_dict(run["state_dict"])
            model.eval()
        return run["options"], run["seconds"]
    except Exception as error:    # the file can be anything
        said = " ".join(str(error).split())[:200]
        raise OSError(f"--load {path}: {type(error).__name__}, {said}")


def save(log, cfg, data, model, seconds, result, sweep, **extra):
    """Write the weights and the log of a run (README: The log) -> lines to print."""
    of_this_machine = ("data", "out", "load", "name", "device", "bf16")
    options = {key: value for key, value in vars(cfg).items() if key not in of_this_machine}
    runs, N = list(sweep.values()), len(result["macs"])
    test = b"".join(part.cpu().numpy().tobytes() for part in data["test"])
    cuda = torch.cuda.get_device_name() if cfg.device == "cuda" else None
    meta = dict(
        schema=2, name=cfg.name, script=SCRIPT, dataset=cfg.dataset, size=cfg.size, seed=cfg.seed,
        options=options, test_sha256=hashlib.sha256(test).hexdigest(), static_macs=model.net.macs,
        at_budget=summary(model, result), full=summary(model, runs[-1]), seconds=seconds,
        threshold=result["threshold"], threads=torch.get_num_threads(), torch=torch.__version__,
        device=cuda or f"CPU, {torch.backends.cpu.get_cpu_capability()}", **extra)
    kept = ("label", "prediction", "macs", "token_macs" if cfg.text else "difficulty")
    arrays = {key: array for key, array in (result | data).items() if key in kept}
    loss = [run["loss"].reshape(N, -1).mean(1) for run in runs]
    correct = [(run["prediction"] == run["label"]).reshape(N, -1).mean(1) for run in runs]
    part = log.with_suffix(".part")    # half a log never looks like a log
    with open(part, "wb") as file:
        np.savez_compressed(
            file, **arrays, loss=result["loss"].astype(np.float16), meta=json.dumps(meta),
            sweep_budget=list(sweep), sweep_threshold=[run["threshold"] for run in runs],
            sweep_macs=[run["macs"] for run in runs], sweep_loss=np.array(loss, np.float16),
            sweep_correct=np.array(correct, np.float16))
    weights = dict(options=options, state_dict=model.state_dict(), seconds=seconds)
    torch.save(weights, log.with_suffix(".pt"))
    part.replace(log)
    lines = []
    for key in ("full", "at_budget", "wall_clock"):
        means = ", ".join(f"{name} {value:.4g}" for name, value in meta[key].items())
        lines.append(f"{key}: {means}")
    return lines


def draw(cfg, data, model, result, sweep, random=()):
    """Quality against MACs; the cheapest examples, below the dearest -> figure, free part of it."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    left, free = top.subfigures(1, 2, width_ratios=(1, 3))
    axis, quality = left.subplots(), "loss" if cfg.text else "accuracy"
    curves = {cfg.name: [summary(model, run) for run in sweep.values()], "at random": random}
    for label, points in curves.items():
        if points:
            axis.plot(*zip(*((p["budget"], p[quality]) for p in points)), "o-", label=label)
    axis.set(xlabel="MACs, share of the static network's", ylabel=quality)
    axis.legend()
    tokens, order, columns = result["token_macs"], result["macs"].argsort(), cfg.tokens // 8
    for axis, i in zip(bottom.subplots(2, 4).flat, [*order[:4], *order[-4:]]):
        x = data["test"][0][i].cpu().numpy()
        for t, code in enumerate(x if cfg.text else []):
            axis.text(t % columns, t // columns, chr(code), ha="center", va="center", fontsize=7)
        if not cfg.text:
            axis.imshow(x.transpose(1, 2, 0), extent=(-0.5, 7.5, 7.5, -0.5))
        axis.imshow(tokens[i].reshape(8, -1), alpha=0.5, vmin=tokens.min(), vmax=tokens.max())
        axis.set_title(f"{result['macs'][i] / model.net.macs:.3f} of the MACs", fontsize=8)
        axis.axis("off")
    return figure, free


def run_script():
    """main(options()), where what a user can cause ends in one line and exit status 2."""
    torch.backends.cudnn.allow_tf32 = False    # evaluation is float32, on a GPU as well
    sys.stdout.reconfigure(errors="replace")    # printing a path of any name never fails
    try:
        main(options())
        sys.stdout.flush()
    except BrokenPipeError:    # `| head -1`; all files are written by then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ImportError, FloatingPointError, KeyboardInterrupt) as error:
        tqdm.write(f"{SCRIPT}.py: {str(error) or 'stopped'}", sys.stderr)
        raise SystemExit(2)
# === end shared ===


if __name__ == "__main__":
    run_script()
