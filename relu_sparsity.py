"""How much of a static ReLU network does nothing?

Every block of the network holds an MLP, two matrix products and a ReLU between (biases apart):

    h = relu(W1 x)
    y = W2 h = sum of h[j] * W2[:, j] over the neurons j that fired, those with h[j] > 0

A neuron that did not fire adds nothing, yet a static network multiplies its column of W2 by 0.
This script trains the static network that all start from, and measures its density: how many fire.
`skipping` saves the MACs (multiply-accumulates) of zeros in W2 h; an oracle would in W1 x as well.

    python relu_sparsity.py --depth 4 --name depth_4         # a smaller one, to compare with

Papers: Li et al. 2023, The Lazy Neuron Phenomenon; Mirzadeh et al. 2023, ReLU Strikes Back; Kurtz
et al. 2020, Inducing and Exploiting Activation Sparsity (the penalty, here divided by H).
"""
import argparse
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

SCRIPT = "relu_sparsity"

def options(argv=None):
    """The command line, or a list of strings -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity-weight", type=float, default=0.0, help="of Hoyer's penalty")
    return parse(parser, argv)


# === the mechanism ===
# Shapes: B batch, T tokens, C width, H = 4 C hidden neurons, L blocks, K classes or characters.

def hoyer(h):
    """Square Hoyer measure |h|_1^2 / (H |h|_2^2) of each row of h (..., H) >= 0, averaged: the
    share of neurons that matter. 1 if all are equal, 1 / H if only one fires, 0 if none does."""
    h = h.float()
    return (h.sum(-1).square() / (h.shape[-1] * h.square().sum(-1) + 1e-9)).mean()

def sparse_product(h, weight):
    """h (N, H) @ weight (H, C) -> (N, C). For each row of h, embedding_bag adds up the rows of
    `weight` whose neuron fired, each times its activation: C MACs for each number that is not 0."""
    row, neuron = h.nonzero(as_tuple=True)
    start = torch.searchsorted(row, torch.arange(len(h), device=h.device))      # first of each row
    return F.embedding_bag(neuron, weight, start, mode="sum", per_sample_weights=h[row, neuron])

class Model(nn.Module):
    """The static network. A neuron fires if h > threshold: 0 is the network as it was trained."""
    cheapest, full = 10.0, 0.0          # hardly any activation is above 10

    def __init__(self, cfg):
        super().__init__()
        self.net, self.sparsity_weight = StaticNet(cfg), cfg.sparsity_weight

    def loss(self, x, y, progress):
        """What training minimises, and numbers for the progress bar; progress: from 0 to 1."""
        logits, fired = self.dense(x)
        loss = F.cross_entropy(logits.movedim(-1, 1), y)
        if self.sparsity_weight:
            loss = loss + self.sparsity_weight * sum(hoyer(h) for h in fired) / len(fired)
        return loss, dict(loss=loss, accuracy=(logits.argmax(-1) == y).float().mean())

    def dense(self, x, threshold=None, decisions=None):
        """x -> logits, and L tensors (B, T, H), the activations that fired. decisions: L such
        tensors of 0 and 1, which say what else must not fire."""
        x, fired = self.net.embed(x), []
        for layer, block in enumerate(self.net.blocks):
            up, _, down = block.mlp
            h = F.threshold(up(block.mix(x)), threshold or 0.0, 0.0)            # a ReLU at 0
            if decisions is not None:
                h = h * decisions[layer]
            fired.append(h)
            x = x + block.drop(down(h))
        return self.net.head(x), fired

    def masked(self, x, threshold=None, decisions=None):
        """Computes everything, counts what fired -> logits, macs (B,), token_macs (B, T)."""
        logits, fired = self.dense(x, threshold, decisions)
        return logits, *self.count_macs(fired)

    def skipping(self, x, threshold):
        """Only neurons that fired enter the second product -> logits, macs, token_macs."""
        x, fired = self.net.embed(x), []
        for block in self.net.blocks:
            up, _, down = block.mlp
            h = F.threshold(up(block.mix(x)), threshold, 0.0)
            fired.append(h)
            rows = down.weight.t().contiguous()     # (H, C): reading columns of W2 would be slow
            x = x + sparse_product(h.flatten(0, 1), rows).view_as(x) + down.bias
        return self.net.head(x), *self.count_macs(fired)

    def count_macs(self, decisions):
        """L tensors (B, T, H), not 0 where a neuron fired -> macs (B,), token_macs (B, T)."""
        silent = sum((h == 0).sum(-1) for h in decisions)                       # (B, T)
        token_macs = self.net.token_macs - silent * self.net.out.in_features
        return self.net.example_macs + token_macs.sum(1), token_macs

@torch.no_grad()
def measure_density(model, x):
    """Share of activations above zero: by example and layer (N, L), by layer and neuron (L, H)."""
    by_example, by_neuron = [], 0
    for some in x.split(100):
        fired = torch.stack(model.dense(some)[1], 1) > 0                        # (B, L, T, H)
        by_example.append(fired.float().mean((2, 3)))
        by_neuron += fired.sum((0, 2))
    return torch.cat(by_example).cpu().numpy(), by_neuron.cpu().numpy() / len(x) / fired.shape[2]

def main(cfg):
    log = output_path(cfg, "logs", ".npz")
    picture = output_path(cfg, "figures", ".png")
    torch.manual_seed(cfg.seed)
    data, model = load_data(cfg), Model(cfg).to(cfg.device)
    cfg.seconds = load(cfg.load, model)["seconds"] if cfg.load else train(model, data, cfg)

    result = evaluate(model, model.skipping, data["test"], model.full)          # skips zeros alone
    by_example, by_neuron = measure_density(model, data["test"][0])
    density = dict(layers=by_example.mean(0).tolist(), neurons=by_neuron.size,
                   never=int((by_neuron == 0).sum()), always=int((by_neuron == 1).sum()),
                   oracle_bound=2 * result["means"]["budget"] - 1)
    save(log, cfg, data, model, result, [result], density=density)

    layers, neurons, tenths = Figure(figsize=(12, 4), layout="constrained").subplots(1, 3)
    layers.violinplot(list(by_example.T), showmedians=True)
    layers.set(title="density, over examples", xlabel="layer")
    neurons.plot(np.sort(by_neuron).T)
    neurons.set(title="how often a neuron fires", xlabel="neurons of a layer, sorted")
    order = result["loss"].reshape(len(by_example), -1).mean(1).argsort()
    tenths.plot([by_example[tenth].mean() for tenth in np.array_split(order, 10)], "o-")
    tenths.set(title="density, by difficulty", xlabel="tenth of the examples, by loss")
    layers.figure.savefig(picture, dpi=120)
    print("density by layer:", *(f"{share:.3f}" for share in density["layers"]))
    print("{never} of {neurons} neurons never fire, {always} always".format(**density))
    print(f"oracle bound: {density['oracle_bound']:.3f} of the MACs; wrote {log} and {picture}")


# Below: identical in every script (budgets: in four of the five); read it once.

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
