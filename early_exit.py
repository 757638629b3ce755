"""Leave when sure: a network with an exit after every block.

Every block gets a head of its own. An easy input leaves early, at the first head that is sure:

    exit = the first l with certainty(head_l(x_l)) >= threshold, or the last

For an image the blocks above never run; for a character their MLPs do not. Certainty is read off a
head's probabilities; or a gate before the head predicts the loss that the rest would save (gain).

`--loss sum` adds up the heads' cross-entropies. `--loss branching` trains them as one soft mixture
with gates g_l, whose expected MACs c_1 it brings to the budget (MACs_l: all up to exit l):

    f_l = g_l softmax(head_l) + (1 - g_l) f_(l+1),      c_l = g_l MACs_l + (1 - g_l) c_(l+1)

Papers: Teerapittayanon et al. 2016, BranchyNet; Scardapane et al. 2020, Differentiable Branching;
Schuster et al. 2022, CALM; Kubaty et al. 2025 (regimes); Angelopoulos et al. 2021, Learn then Test.
Deviation: branching adds the last head's own loss, or gates starve it. Try `--risk 0.03`.
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

SCRIPT = "early_exit"

def options(argv=None):
    """The command line, or a list of strings -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--budget", type=float, default=0.5, help="share of static MACs (default: %(default)s)")
    add("--regime", choices=["joint", "frozen", "mixed"],
        help="early heads train the blocks: always, never, late (default: mixed; for a text joint)")
    add("--loss", choices=["sum", "branching"], default="sum", help="how the heads are trained")
    add("--criterion", choices=["confidence", "margin", "entropy", "gain"],
        help="best class, lead over the second, 1 - entropy, a gate (default: margin, or gain)")
    add("--risk", type=float, default=0.0, help="in place of a budget: answers that may turn wrong")
    cfg = parse(parser, argv)
    cfg.regime = cfg.regime or ("joint" if cfg.text else "mixed")
    cfg.criterion = cfg.criterion or ("gain" if cfg.text or cfg.loss != "sum" else "margin")
    if cfg.loss == "branching" and cfg.criterion != "gain":
        parser.error("--loss branching decides by its gates: leave --criterion out")
    if not (0 < cfg.budget <= 1 and 0 <= cfg.risk < 1 and cfg.depth > 1):
        parser.error("--budget and --risk must be between 0 and 1, --depth at least 2")
    return cfg


# === the mechanism ===
# Shapes: B batch, T tokens, C width, L exits, K classes; ... stands for (B,), in a text for (B, T).

def certainty(logits, criterion):
    """How sure a head is, from 0 to 1: logits (..., K) -> (...)."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    if criterion == "entropy":
        return 1 + (p * log_p).sum(-1) / math.log(p.shape[-1])
    best, second = p.topk(2, dim=-1).values.unbind(-1)
    return {"confidence": best, "margin": best - second}[criterion]

class Readout(nn.Module):
    """LayerNorm and a small network, for a head or a gate: characters (..., C) -> (..., out); or
    images (n, 64, C) -> (n, out), 8 x 8 tokens averaged to 4 x 4: it sees where things are."""

    def __init__(self, width, sizes, image):
        super().__init__()
        self.image, self.norm = image, nn.LayerNorm(width)
        sizes = [16 * width if image else width, *sizes]
        layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
        self.macs = sum(layer.weight.numel() for layer in layers)
        self.out = nn.Sequential(layers[0], *(m for each in layers[1:] for m in (nn.ReLU(), each)))

    def forward(self, x):
        if not self.image:
            return self.out(self.norm(x))
        x = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (8, 8)), 2)             # (n, C, 4, 4)
        return self.out(self.norm(x.flatten(2).transpose(1, 2)).flatten(1))

def exit_weights(gate):
    """Soft branching: gates (L - 1, ...) -> weights of exits (L, ...), g_l prod_(j < l) (1 - g_j);
    the last takes what is left."""
    stay = torch.cat([torch.ones_like(gate[:1]), (1 - gate).cumprod(0)])
    return stay * torch.cat([gate, torch.ones_like(gate[:1])])

class Model(nn.Module):
    """The static network with exits; an input leaves where its certainty reaches the threshold."""
    cheapest, full = -0.01, 1.01        # everything leaves at the first exit, or at the last

    def __init__(self, cfg):
        super().__init__()
        self.net, self.text, self.budget = StaticNet(cfg), cfg.text, cfg.budget
        self.regime, self.criterion = cfg.regime, cfg.criterion
        self.early = 0.1 if cfg.text else 0.3       # weight of an early loss; the last one's is 1
        self.branching = cfg.loss == "branching"
        early, sizes = range(cfg.depth - 1), [cfg.classes] if cfg.text else [64, cfg.classes]
        self.heads = nn.ModuleList(Readout(cfg.width, sizes, not cfg.text) for _ in early)
        gated = early if self.branching or cfg.criterion == "gain" else []
        self.gates = nn.ModuleList(Readout(cfg.width, [16, 1], not cfg.text) for _ in gated)
        runs = torch.ones(cfg.depth, cfg.depth).triu()      # row: block; column: exit; 1 if it runs
        runs = runs[..., None].expand(-1, -1, cfg.tokens) if cfg.text else runs
        self.exit_macs = self.count_macs(runs)[0]                               # (L,)

    def sure(self, layer, x, logits=None):      # -> (...), from 0 to 1; a gate needs no logits
        if self.gates:
            return self.gates[layer](x).float().sigmoid().squeeze(-1)
        return certainty(logits.detach(), self.criterion)

    def all_exits(self, x, threshold=None, decisions=None, apart=False):
        """Everything is computed; what left keeps its state -> logits (L, ..., K), certainties
        (L - 1, ...), 1 where a block runs (L, ...). apart: early heads do not train the blocks."""
        x, logits, certainties, runs = self.net.embed(x), [], [], []
        active = x.new_ones(x.shape[:2] if self.text else x.shape[:1])
        for layer, block in enumerate(self.net.blocks):
            active = active if decisions is None else decisions[layer]
            wide = active[..., None] if self.text else active[:, None, None]
            x = torch.where(wide > 0, block(x), x)
            runs.append(active)
            if layer == len(self.heads):
                break
            seen = x.detach() if apart else x
            logits.append(self.heads[layer](seen))
            certainties.append(self.sure(layer, seen if self.branching else x.detach(), logits[-1]))
            if threshold is not None:
                active = active * (certainties[-1] < threshold)
        logits.append(self.net.head(x))
        return torch.stack(logits), torch.stack(certainties), torch.stack(runs)

    def dense(self, x, threshold=None, decisions=None):
        """x -> logits of the exit where each image or character left, decisions (L, ...)."""
        logits, _, decisions = self.all_exits(x, threshold, decisions)
        last = decisions.sum(0).long() - 1                                      # (...)
        return logits.take_along_dim(last[None, ..., None], 0)[0], decisions

    def loss(self, x, y, progress):
        """What training minimises, and numbers for the progress bar."""
        apart = self.regime == "frozen" or self.regime == "mixed" and progress < 0.6
        logits, sure, _ = self.all_exits(x, apart=apart)
        each = torch.stack([F.cross_entropy(z.movedim(-1, 1), y, reduction="none") for z in logits])
        losses = each.flatten(1).mean(1)                                        # (L,)
        if not self.branching:
            loss = self.early * losses[:-1].sum() + losses[-1]
            loss = loss / (self.early * len(self.heads) + 1)
            if self.gates:
                gain = (each[:-1] - each[-1]).detach()      # what the rest of the network saves
                loss = loss + 0.1 * (sure.logit(1e-6) + gain).square().mean()
            return loss, dict(loss=losses[-1])
        weights = exit_weights(sure)                                            # (L, ...)
        log_p = weights.clamp_min(1e-9).log()[..., None] + logits.float().log_softmax(-1)
        loss = F.nll_loss(log_p.logsumexp(0).movedim(-1, 1), y)
        macs = (weights.flatten(1).mean(1) * (self.exit_macs / self.net.macs).to(x.device)).sum()
        loss = losses[-1] + loss + 10 * (macs - self.budget).square()
        return loss, dict(loss=losses[-1], macs=macs)

    def masked(self, x, threshold=None, decisions=None):
        """Computes everything, counts what ran -> logits, macs (B,), token_macs (B, T)."""
        logits, decisions = self.dense(x, threshold, decisions)
        return logits, *self.count_macs(decisions)

    def skipping(self, x, threshold):
        """Blocks, in a text their MLPs, run only for what has not left -> logits and MACs."""
        x, decisions = self.net.embed(x), []
        active = torch.ones(x.shape[:2] if self.text else x.shape[:1], dtype=bool, device=x.device)
        answer = x.new_zeros(*active.shape, self.net.out.out_features)
        for layer, block in enumerate(self.net.blocks):
            decisions.append(active)
            here = x[active] + block.mlp(block.mix(x)[active]) if self.text else block(x)
            x = x.masked_scatter(active[..., None], here) if self.text else here
            if layer == len(self.heads):
                break
            logits = None if self.gates else self.heads[layer](here)
            leaves = self.sure(layer, here, logits) >= threshold                # (n,)
            leaving = torch.zeros_like(active).masked_scatter(active, leaves)
            logits = self.heads[layer](here[leaves]) if self.gates else logits[leaves]
            answer[leaving] = logits.to(answer)
            active = active & ~leaving
            x = x if self.text else x[~leaves]
        answer[active] = self.net.head(here).to(answer)
        return answer, *self.count_macs(decisions)

    def count_macs(self, decisions):
        """Layers of (...), 1 where a block ran -> macs (B,), token_macs (B, T). All heads on the
        way ran; or all gates, and the head where it left."""
        net, L, depth = self.net, len(self.net.blocks), sum(decisions).long()
        head = self.heads[0].macs
        passed, last = (self.gates[0].macs, head) if self.gates else (head, 0)
        heads = depth.clamp_max(L - 1) * passed + (depth < L) * last + (depth == L) * net.head_macs
        if self.text:
            token_macs = L * net.block_macs - (L - depth) * 8 * net.out.in_features ** 2 + heads
            return token_macs.sum(1), token_macs
        token_macs = (depth * net.block_macs)[:, None].expand(-1, len(net.position))
        return net.example_macs - net.head_macs + heads + token_macs.sum(1), token_macs

def certified_threshold(model, split, risk, error=0.05):
    """Learn then Test: thresholds, ever bolder, until Hoeffding's bound no longer says that at most
    `risk` of the answers turn wrong (right in full, wrong early) -> the last that passed."""
    right = evaluate(model, model.masked, split, model.full)["correct"]         # (N, ...)
    slack, passed = math.sqrt(-math.log(error) / 2 / len(right)), model.full
    for threshold in tqdm(1 - np.linspace(0, 1, 51) ** 2, "certify"):
        lost = right & ~evaluate(model, model.masked, split, threshold)["correct"]
        if lost.mean() + slack > risk:
            break
        passed = float(threshold)
    print(f"certified threshold: {passed:.3f} (at {model.full} nothing could be certified)")
    return passed

def main(cfg):
    log = output_path(cfg, "logs", ".npz")
    picture = output_path(cfg, "figures", ".png")
    torch.manual_seed(cfg.seed)
    data, model = load_data(cfg), Model(cfg).to(cfg.device)
    cfg.seconds = load(cfg.load, model)["seconds"] if cfg.load else train(model, data, cfg)

    search, aim = (certified_threshold, cfg.risk) if cfg.risk else (calibrate, cfg.budget)
    threshold = search(model, data["calibration"], aim)
    result = evaluate(model, model.skipping, data["test"], threshold)
    sweep, random = sweep_budgets(model, data)
    save(log, cfg, data, model, result, sweep, random=random)

    unit, key = (cfg.tokens, "token_macs") if cfg.text else (1, "macs")
    left = [[(run[key] == macs // unit).mean() for macs in model.exit_macs.tolist()]
            for run in sweep]                                                   # (S, L)
    axis = Figure(figsize=(8, 5), layout="constrained").subplots()
    axis.plot(np.transpose(left), "o-")
    axis.set(xlabel="exit", ylabel="share that leaves", xticks=range(cfg.depth))
    axis.legend([f"{run['macs'].mean() / model.net.macs:.2f}" for run in sweep], title="MACs")
    axis.figure.savefig(picture, dpi=120)
    print(f"wrote {log} and {picture}")


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
