"""Leave when sure: a network with an exit after every block.

An easy input is often clear after a few blocks. Every block gets a head of its own, and an input
leaves at the first head that is sure enough; for this input, the rest of the network never runs:

    exit = the first l with certainty(head_l(x_l)) >= threshold, or the last

An image leaves as a whole. In a text each character leaves on its own: its decision reads only what
came before, and the blocks above skip its MLP; their convolutions run at all positions. Training
runs everything. Certainty is read off a head's probabilities, or (`--criterion gain`) learned by a
gate before the head, which predicts the loss that the rest would save; large heads then run once.

`--loss sum` adds up the heads' cross-entropies. `--loss branching` trains them as one soft mixture
with gates g_l, whose expected MACs c_1 it brings to the budget (MACs_l: all up to exit l):

    f_l = g_l softmax(head_l) + (1 - g_l) f_(l+1),      c_l = g_l MACs_l + (1 - g_l) c_(l+1)

    python early_exit.py                                     # CIFAR-10
    python early_exit.py --dataset shakespeare               # characters
    python early_exit.py --risk 0.03                         # a guarantee instead of a budget

Papers: Teerapittayanon et al. 2016, BranchyNet; Huang et al. 2018, MSDNet; Scardapane et al. 2020,
Differentiable Branching; Schuster et al. 2022, CALM; Kubaty et al. 2025 (regimes); Angelopoulos et
al. 2021, Learn then Test. Deviation: branching adds the last head's own loss, or gates starve it.
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

SCRIPT = "early_exit"
EARLY = (0.3, 0.1)      # weight of an early head's loss, images and text; the last one's is 1


def options(argv=None):
    """The command line, or a list of strings -> namespace."""
    parser = shared_options(__doc__)
    add = parser.add_argument
    add("--budget", type=float, default=0.5, help="mean MACs, as a share of the static network's")
    add("--regime", choices=["joint", "frozen", "mixed"],
        help="early heads train the blocks: always, never, late (default: mixed; for a text joint)")
    add("--loss", choices=["sum", "branching"], default="sum", help="how the heads are trained")
    add("--criterion", choices=["confidence", "margin", "entropy", "gain"],
        help="how sure a head is: by its best class, by the lead over the second, by 1 - entropy / "
             "maximum, or by a learned gate (default: margin; for a text gain)")
    add("--risk", type=float, default=0.0,
        help="instead of the budget, a guarantee: the share of right answers that may turn wrong")
    cfg = complete(parser, argv)
    cfg.regime = cfg.regime or ("joint" if cfg.text else "mixed")
    cfg.criterion = cfg.criterion or ("gain" if cfg.text else "margin")
    if not (0 < cfg.budget <= 1 and 0 <= cfg.risk < 1 and cfg.depth > 1):
        parser.error("--budget and --risk must be between 0 and 1, --depth at least 2")
    return cfg


# Shapes: B batch, T tokens, C width, L exits (one per block), K classes or characters; "..." stands
# for what leaves: (B,) for images, (B, T) for characters.

# === the mechanism ===
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
    images (n, 64, C) -> (n, out), 8 x 8 tokens first averaged to 4 x 4: it sees where things are."""

    def __init__(self, width, sizes, image):
        super().__init__()
        self.image, self.norm = image, nn.LayerNorm(width)
        sizes, layers = [16 * width if image else width, *sizes], []
        for a, b in zip(sizes, sizes[1:]):
            layers += [nn.ReLU(), nn.Linear(a, b)]
        self.out = nn.Sequential(*layers[1:])
        self.macs = sum(a * b for a, b in zip(sizes, sizes[1:]))

    def forward(self, x):
        if self.image:
            grid = x.transpose(1, 2).unflatten(2, (8, 8))
            x = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)                # (n, 16, C)
        x = self.norm(x)
        return self.out(x.flatten(1) if self.image else x)


def exit_weights(gate):
    """Soft branching: gates (L - 1, ...) -> weight (L, ...) of each exit in the mixture, which is
    w_l = g_l * product of (1 - g_j) over the exits j before it. The last takes what is left."""
    stay = torch.cat([torch.ones_like(gate[:1]), (1 - gate).cumprod(0)])
    return stay * torch.cat([gate, torch.ones_like(gate[:1])])


class Model(nn.Module):
    """The static network with an exit after every block; the last one is its own head. An image, or
    a character, leaves at the first exit whose certainty is at least the threshold."""
    cheapest, full = -0.01, 1.01        # everything leaves at the first exit, or at the last

    def __init__(self, cfg):
        super().__init__()
        self.net, self.text, self.budget = StaticNet(cfg), cfg.text, cfg.budget
        self.regime, self.criterion = cfg.regime, cfg.criterion
        self.branching = cfg.loss == "branching"
        early, image = range(cfg.depth - 1), not cfg.text
        sizes = [cfg.classes] if cfg.text else [64, cfg.classes]
        self.heads = nn.ModuleList(Readout(cfg.width, sizes, image) for _ in early)
        self.gates = nn.ModuleList()
        if self.branching or cfg.criterion == "gain":
            self.gates.extend(Readout(cfg.width, [16, 1], image) for _ in early)
        runs = torch.ones(cfg.depth, cfg.depth).triu()      # row: block; column: exit; 1 if it runs
        runs = runs[..., None].expand(-1, -1, cfg.tokens) if cfg.text else runs
        self.exit_macs = self.count_macs(runs)[0]                               # (L,)

    def answer(self, layer, x):
        """States after a block -> logits (..., K) of its exit."""
        return self.heads[layer](x) if layer < len(self.heads) else self.net.head(x)

    def sure(self, layer, x, logits=None):
        """How sure an exit is (...), from 0 to 1; a gate needs no logits."""
        if self.gates:
            return self.gates[layer](x).float().sigmoid().squeeze(-1)
        return certainty(logits.detach(), self.criterion)

    def all_exits(self, x, threshold=None, decisions=None, apart=False):
        """Everything is computed; what has left keeps its state -> logits (L, ..., K), certainty
        (L - 1, ...), and decisions (L, ...), 1 where a block still runs. At first all run. apart:
        early heads learn, and do not teach the blocks."""
        x, logits, certainties, runs = self.net.embed(x), [], [], []
        active = x.new_ones(x.shape[:2] if self.text else x.shape[:1])
        for layer, block in enumerate(self.net.blocks):
            active = active if decisions is None else decisions[layer]
            wide = active[..., None] if self.text else active[:, None, None]
            x = torch.where(wide > 0, block(x), x)
            runs.append(active)
            if layer == len(self.net.blocks) - 1:
                logits.append(self.answer(layer, x))
                break
            seen = x.detach() if apart else x
            logits.append(self.answer(layer, seen))
            certainties.append(self.sure(layer, seen if self.branching else x.detach(), logits[-1]))
            if threshold is not None:
                active = active * (certainties[-1] < threshold)
        return torch.stack(logits), torch.stack(certainties), torch.stack(runs)

    def dense(self, x, threshold=None, decisions=None):
        """x -> logits of the exit where each image or character left, decisions (L, ...)."""
        logits, _, decisions = self.all_exits(x, threshold, decisions)
        last = decisions.sum(0).long() - 1                                      # (...)
        return logits.take_along_dim(last[None, ..., None], 0)[0], decisions

    def loss(self, x, y, progress):
        """What training minimises, and numbers for the progress bar."""
        apart = self.regime == "frozen" or self.regime == "mixed" and progress < 0.6    # late
        logits, sure, _ = self.all_exits(x, apart=apart)
        each = torch.stack([F.cross_entropy(z.movedim(-1, 1), y, reduction="none") for z in logits])
        losses = each.flatten(1).mean(1)                                        # (L,)
        shown = dict(loss=losses[-1], accuracy=(logits[-1].argmax(-1) == y).float().mean())
        if not self.branching:
            weight = EARLY[self.text]
            loss = (losses[-1] + weight * losses[:-1].sum()) / (1 + weight * (len(losses) - 1))
            if self.gates:
                gain = (each[:-1] - each[-1]).detach()      # what the rest of the network saves
                loss = loss + 0.1 * (sure.logit(1e-6) + gain).square().mean()
            return loss, shown
        weights = exit_weights(sure)                                            # (L, ...)
        log_p = weights.clamp_min(1e-9).log()[..., None] + logits.float().log_softmax(-1)
        loss = F.nll_loss(log_p.logsumexp(0).movedim(-1, 1), y)
        macs = (weights.flatten(1).mean(1) * self.exit_macs.to(weights.device)).sum()
        macs = macs / self.net.macs
        loss = losses[-1] + loss + 10 * (macs - self.budget).square()
        return loss, shown | dict(macs=macs)

    def masked(self, x, threshold):
        """Computes everything, counts what ran -> logits, macs (B,), token_macs (B, T)."""
        logits, decisions = self.dense(x, threshold)
        return logits, *self.count_macs(decisions)

    def leaving_at(self, x, last):
        """The same, where everything leaves at one exit, 1 to L."""
        logits, _, decisions = self.all_exits(x)
        return logits[last - 1], *self.count_macs(decisions[:last])

    def skipping(self, x, threshold):
        """Blocks, in a text their MLPs, run only for what has not left -> logits and MACs."""
        x, decisions = self.net.embed(x), []
        active = torch.ones(x.shape[:2] if self.text else x.shape[:1], dtype=bool, device=x.device)
        answer = x.new_zeros(*active.shape, self.net.out.out_features)
        for layer, block in enumerate(self.net.blocks):
            decisions.append(active)
            if self.text:
                here = x[active] + block.mlp(block.mix(x)[active])              # (n, C)
                x[active] = here
            elif len(x):
                here = x = block(x)                                             # (n, T, C)
            else:
                break
            if layer == len(self.net.blocks) - 1:
                answer[active] = self.answer(layer, here)
                break
            logits = None if self.gates else self.answer(layer, here)
            leaves = self.sure(layer, here, logits) >= threshold                # (n,)
            leaving = torch.zeros_like(active).masked_scatter(active, leaves)
            answer[leaving] = self.answer(layer, here[leaves]) if self.gates else logits[leaves]
            active = active & ~leaving
            x = x if self.text else x[~leaves]
        return answer, *self.count_macs(decisions)

    def count_macs(self, decisions):
        """Layers of (...), 1 where a block ran -> macs (B,), token_macs (B, T). All heads on the
        way ran; or all gates, and the head where it left."""
        net, L, depth = self.net, len(self.net.blocks), sum(decisions).long()
        head = self.heads[0].macs
        passed, last = (self.gates[0].macs, head) if self.gates else (head, 0)
        heads = depth.clamp_max(L - 1) * passed + (depth < L) * last + (depth == L) * net.head_macs
        if self.text:
            skipped = (L - depth) * 8 * net.out.in_features ** 2                # MLPs
            token_macs = L * net.block_macs - skipped + heads
            return token_macs.sum(1), token_macs
        token_macs = (depth * net.block_macs)[:, None].expand(-1, len(net.position))
        return net.example_macs - net.head_macs + heads + token_macs.sum(1), token_macs


def certify(lost, risk, error=0.05):
    """Learn then Test: what N examples lose, in [0, 1], from the safest threshold to the boldest,
    S x (N,) -> the last index before the first whose true mean could exceed `risk`, or None. By
    Hoeffding it exceeds the observed one by more than sqrt(ln(1 / error) / 2 N) with probability
    at most `error`."""
    last = None
    for index, losses in enumerate(lost):
        if losses.mean() + math.sqrt(math.log(1 / error) / (2 * len(losses))) > risk:
            break
        last = index
    return last


def certified_threshold(model, split, risk):
    """The boldest of 51 thresholds at which, 95 % certain, at most `risk` of the answers are right
    in full and wrong early; that of the full model if too few examples can tell."""
    def right(threshold):
        result = evaluate(model.masked, split, threshold)
        return (result["prediction"] == result["label"]).reshape(len(result["macs"]), -1)

    grid = model.full + (model.cheapest - model.full) * np.linspace(0, 1, 51) ** 2
    full = right(model.full)
    index = certify(((full & ~right(each)).mean(1) for each in tqdm(grid, "certify")), risk)
    if index is None:
        least = math.sqrt(math.log(20) / (2 * len(full)))
        tqdm.write(f"{len(full)} examples certify no risk below {least:.3f}: nothing leaves early",
                   sys.stderr)
    return float(grid[index or 0])


def main(cfg):
    log, picture = output_paths(cfg)
    torch.manual_seed(cfg.seed)
    data, model = load_data(cfg), Model(cfg).to(cfg.device)
    seconds = load(cfg.load, model)[1] if cfg.load else train(model, data, cfg)

    threshold, thresholds = calibrate(model, data["calibration"], cfg.budget)
    if cfg.risk:
        threshold = certified_threshold(model, data["calibration"], cfg.risk)
    result = evaluate(model.skipping, data["test"], threshold)
    sweep, random = {}, []
    for budget, each in tqdm(thresholds.items(), "sweep"):
        sweep[budget] = evaluate(model.skipping, data["test"], each)
        random.append(summary(model, evaluate_random(model, data["test"], each)))
    clock = wall_clock(cfg, model, data["test"][0], threshold)
    means = save(log, cfg, data, model, seconds, result, sweep, wall_clock=clock, random=random)

    exits = [evaluate(model.leaving_at, data["test"], last) for last in range(1, cfg.depth + 1)]
    of = "token_macs" if cfg.text else "macs"
    left = [(result[of] == each[of].flat[0]).mean() for each in exits]
    right = np.array([each["prediction"] == each["label"] for each in exits])
    figure, free = draw(cfg, data, model, result, sweep, random)
    axis, numbers = free.subplots(), range(1, cfg.depth + 1)
    axis.bar(numbers, left, color="lightgrey", label="share that leaves here")
    axis.plot(numbers, right.reshape(cfg.depth, -1).mean(1), "o-", label="accuracy, if all did")
    axis.set(xlabel="exit", xticks=numbers)
    axis.legend()
    figure.savefig(picture, dpi=120)
    print(*means, sep="\n")
    for number, each in zip(numbers, exits):
        quality = ", ".join(f"{key} {mean:.4f}" for key, mean in summary(model, each).items())
        print(f"exit {number}: {left[number - 1]:.3f} leave here; if all did: {quality}")
    lost = right[-1] & (result["prediction"] != result["label"])
    overthought = right[:-1].any(0) & ~right[-1]
    print(f"wrong where they left, right at the last exit: {lost.mean():.4f}; wrong at the last, "
        f"right at an earlier one (overthinking): {overthought.mean():.4f}")
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
