"""As many learners as each token needs: every MLP becomes a sequence of small ones, with a gate.

Boosting adds weak learners one by one, each correcting what the ones before it left. Cut the hidden
layer of an MLP into N slices of H / N neurons: each is a learner, and with the first k of them

    y_k = b + L_1(x) + ... + L_k(x),      L_n(x) = W2[:, n] relu(W1[n] x + b1[n])

y_0 is the output bias alone, y_N the whole MLP. A small gate reads a token and gives each learner a
score; a learner runs if its score, and those of all before it, are above a price. One price holds
for all layers and tokens: whoever gains most from the next learner gets it.

The static network trains alone first; then its neurons are sorted, the most useful first, and gates
join. Each batch has a budget, drawn around `--budget`, and the price that meets it, a quantile of
the scores seen last. Scores carry noise, and learn by the straight-through gradient of a sigmoid.
An eighth of a batch runs all learners, an eighth as many for all tokens of an example, drawn at
random: so every prefix is a working MLP. No loss term asks for a budget, or that inputs differ.

    python token_boost.py                                    # CIFAR-10
    python token_boost.py --dataset shakespeare              # characters

Papers: Wójcik et al. 2023, Adaptive Computation Modules; Yu et al. 2019 (the sandwich rule).
Deviations: learners are slices of the MLP itself; a price in place of budget and entropy losses.
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

SCRIPT = "token_boost"


def options(argv=None):
    """The command line, or a list of strings -> namespace."""
    parser = shared_options(__doc__)
    add = parser.add_argument
    add("--budget", type=float, default=0.5, help="mean MACs, as a share of the static network's")
    add("--learners", type=int, default=4, help="slices of an MLP's neurons, run one by one")
    cfg = complete(parser, argv)
    if not 0 < cfg.budget <= 1 or cfg.learners < 1 or 4 * cfg.width % cfg.learners:
        parser.error(f"--budget is at most 1, and --learners divide {4 * cfg.width} neurons")
    return cfg


# Shapes: B batch, T tokens, C width, H hidden neurons, L blocks, N learners of each, K classes or
# characters.

# === the mechanism ===
class Gate(nn.Module):
    """A small network: tokens (..., C) -> scores of the learners (..., N), never rising: a token
    that runs a learner runs all before it."""

    def __init__(self, width, learners, hidden=16):
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, learners)
        self.macs = width * hidden + hidden * learners

    def forward(self, x, noise=False):
        z = self.out(self.hidden(x).relu()).float()
        if noise:
            z = z + torch.rand_like(z).logit(1e-6)      # logistic: z > price by sigmoid(z - price)
        return z.cummin(-1).values


class BoostedMLP(nn.Module):
    """C -> H -> ReLU -> C, of which learner n is a slice of the hidden neurons."""

    def __init__(self, width, hidden, learners):
        super().__init__()
        self.learners = learners
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x, runs=None):
        """All learners, multiplied by runs (..., N): x (..., C) -> (..., C)."""
        h = self.up(x).relu()
        if runs is not None:
            h = (h.unflatten(-1, (self.learners, -1)) * runs[..., None].to(h.dtype)).flatten(-2)
        return self.down(h)

    def first(self, x, count):
        """x (..., C), count (...): tokens that want the same k run k learners, in one product."""
        y = torch.empty_like(x)
        for k in range(self.learners + 1):                      # with k = 0 products are empty
            wants, some = count == k, k * len(self.up.weight) // self.learners
            h = F.linear(x[wants], self.up.weight[:some], self.up.bias[:some]).relu()
            y[wants] = F.linear(h, self.down.weight[:, :some], self.down.bias).to(y.dtype)
        return y

    @torch.no_grad()
    def sort(self, x):
        """Put first the neurons with the largest mean activation, over x (..., C), times norm of
        their column of W2. The MLP remains the same function."""
        use = self.up(x).relu().flatten(0, -2).mean(0) * self.down.weight.norm(dim=0)
        order = use.argsort(descending=True)
        for parameter in (self.up.weight, self.up.bias):
            parameter.copy_(parameter[order])
        self.down.weight.copy_(self.down.weight[:, order])


class Model(nn.Module):
    """The static network with a gate in every block. A learner runs if its score is above the
    threshold, the price."""
    cheapest, full = 1e9, -1e9          # far outside the scores: no learner runs; all do

    def __init__(self, cfg):
        super().__init__()
        self.net, self.budget, C = StaticNet(cfg), cfg.budget, cfg.width
        self.learners, self.sorted = cfg.learners, False
        for block in self.net.blocks:
            block.mlp = BoostedMLP(C, 4 * C, cfg.learners)
        self.gates = nn.ModuleList(Gate(C, cfg.learners) for _ in range(cfg.depth))
        self.learner_macs = 8 * C * C // cfg.learners                           # of one token
        self.fixed_macs = self.net.token_macs + cfg.depth * (self.gates[0].macs - 8 * C * C)
        self.price = torch.tensor(0.0)

    def dense(self, x, threshold=None, decisions=None):
        """All learners are computed -> logits, and which of them run (L, B, T, N). Without a
        threshold they are sampled, as training needs it."""
        logits, runs, _ = self.all_learners(x, threshold, decisions)
        return logits, runs

    def all_learners(self, x, threshold=None, decisions=None):
        """The same, and the scores (L, B, T, N)."""
        x, layers, scores = self.net.embed(x), [], []
        count = torch.randint(self.learners + 1, (len(x) // 8, 1, 1), device=x.device)
        for layer, (block, gate) in enumerate(zip(self.net.blocks, self.gates)):
            h = block.mix(x)
            z = gate(h.detach(), noise=threshold is None)
            if decisions is not None:
                runs = decisions[layer]
            elif threshold is not None:
                runs = (z > threshold).to(h.dtype)
            else:
                runs = self.sample(z, count)
            layers.append(runs)
            scores.append(z)
            x = x + block.drop(block.mlp(h, runs))
        return self.net.head(x), torch.stack(layers), torch.stack(scores)

    def sample(self, z, count):
        """Noisy scores (B, T, N), count (n, 1, 1) -> learners that run in training (B, T, N): all of
        them in the first n examples, `count` for every token in the next n."""
        soft = (z - self.price).sigmoid()
        runs = (soft > 0.5).to(soft.dtype) + soft - soft.detach()               # straight through
        even = (torch.arange(self.learners, device=z.device) < count).expand(-1, *z.shape[1:])
        return torch.cat([torch.ones_like(even), even, runs[2 * len(count):]])

    def loss(self, x, y, progress):
        """What training minimises, and numbers for the progress bar."""
        if progress < 0.2:
            logits = self.net(x)
            loss = F.cross_entropy(logits.movedim(-1, 1), y)
            return loss, dict(loss=loss, accuracy=(logits.argmax(-1) == y).float().mean())
        if not self.sorted:
            self.sort(x)
        logits, runs, scores = self.all_learners(x)
        loss, free = F.cross_entropy(logits.movedim(-1, 1), y), 2 * (len(x) // 8)
        macs = self.count_macs(runs[:, free:].detach())[0].mean() / self.net.macs
        self.meet(self.budget + 0.4 * torch.rand(()).item() - 0.2, scores[:, free:].detach())
        right = (logits.argmax(-1) == y).float().mean()
        return loss + 0.001 * scores.square().mean(), dict(loss=loss, accuracy=right, macs=macs)

    def meet(self, budget, scores):
        """Set the price at which tokens with such scores spend a budget."""
        tokens = len(self.net.position)
        least = self.net.example_macs + tokens * self.fixed_macs
        most = least + tokens * len(self.gates) * self.learners * self.learner_macs
        share = (budget * self.net.macs - least) / (most - least)               # of learners
        self.price = scores.flatten()[::7].quantile(1 - min(max(share, 0), 1))

    @torch.no_grad()
    def sort(self, x):
        """Sort the neurons of every layer by their use on a batch."""
        x = self.net.embed(x)
        for block in self.net.blocks:
            block.mlp.sort(block.mix(x))
            x = block(x)
        self.sorted = True

    def masked(self, x, threshold):
        """Computes everything, counts what was chosen -> logits, macs (B,), token_macs (B, T)."""
        logits, runs = self.dense(x, threshold)
        return logits, *self.count_macs(runs.long())

    def even(self, x, count):
        """The same, with the first `count` learners for every token."""
        runs = x.new_zeros(len(self.gates), len(x), len(self.net.position), self.learners, dtype=int)
        runs[..., :count] = 1
        logits, runs = self.dense(x, decisions=runs)
        return logits, *self.count_macs(runs)

    def skipping(self, x, threshold):
        """Every token runs its first learners and no others -> logits, macs, token_macs."""
        x, decisions = self.net.embed(x), []
        for block, gate in zip(self.net.blocks, self.gates):
            h = block.mix(x)
            runs = (gate(h) > threshold).long()
            decisions.append(runs)
            x = x + block.mlp.first(h, runs.sum(-1))
        return self.net.head(x), *self.count_macs(decisions)

    def count_macs(self, decisions):
        """Which learners run, L times (B, T, N) of 0 and 1 -> macs (B,), token_macs (B, T)."""
        count = sum(runs.sum(-1) for runs in decisions)
        token_macs = self.fixed_macs + count * self.learner_macs
        return self.net.example_macs + token_macs.sum(1), token_macs


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
    even = [summary(model, evaluate(model.even, data["test"], k)) for k in range(cfg.learners + 1)]
    means = save(log, cfg, data, model, seconds, result, sweep, wall_clock=clock, random=random,
                 even=even)

    with torch.no_grad():
        counts = torch.cat([model.dense(network_input(x), threshold)[1].sum(-1)
                            for x in data["calibration"][0].split(250)], 1)     # (L, B, T)
    figure, free = draw(cfg, data, model, result, sweep, random)
    learners, prefixes = free.subplots(1, 2)
    share = [(counts == k).float().mean((1, 2)).tolist() for k in range(cfg.learners + 1)]
    image = learners.imshow(share, aspect="auto", vmin=0, origin="lower")
    learners.set(title="share of tokens", xlabel="layer", ylabel="learners that run",
                 xticks=range(cfg.depth))
    free.colorbar(image, ax=learners)
    prefixes.plot([each["loss"] for each in even], "o-")
    prefixes.set(title="loss with the first k learners everywhere", xlabel="k", yscale="log")
    figure.savefig(picture, dpi=120)
    print(*means, sep="\n")
    print("mean learners by layer:", *(f"{k:.2f}" for k in counts.float().mean((1, 2))))
    for k, each in enumerate(even):
        quality = ", ".join(f"{key} {mean:.4f}" for key, mean in each.items())
        print(f"{k} learners for every token: {quality}")
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
