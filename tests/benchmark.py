"""Speed and memory, as ratios: machines are noisy. One table at a time, on the CPU:

    python tests/benchmark.py                   # a training step of each script, beside the static one
    python tests/benchmark.py --table token     # zeros in one MLP, one token at a time, by width
    python tests/benchmark.py --table experts   # one layer of experts, beside dense MLPs

Medians of runs by turns in one process (memory: a process for each), after a warm-up.
"""
import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from conftest import NAMES, build, configure, inputs, scripts

STATIC = NAMES[0]


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def median_seconds(runs, repeats=15):
    """{name: function} -> {name: seconds}."""
    seconds = {name: [] for name in runs}
    for _ in range(3 + repeats):
        for name, function in runs.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.median(taken[3:]) for name, taken in seconds.items()}


def step_of(name, dataset):
    """A function that takes one training step at --size small, and how many examples that is."""
    script, cfg = scripts[name], configure(scripts[name], dataset, "small")
    model, x = build(script, dataset, "small").train(), inputs(dataset, "small", cfg.batch)
    y = torch.randint(10, (cfg.batch, cfg.tokens) if cfg.text else (cfg.batch,))
    matrices = [p for p in model.net.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [torch.optim.Muon(matrices, 1e-3, adjust_lr_fn="original"), torch.optim.AdamW(others, 1e-3)]

    def step():
        model.zero_grad()
        model.loss(x, y, 0.7)[0].backward()
        for optimizer in optimizers:
            optimizer.step()
    return step, cfg.batch


def training():
    """Examples/s, and the most memory that a process needs which takes three steps."""
    print_row("script", "data", "examples/s", "time of a step / static", "peak memory, MB", "/ static")
    print_row(*["---"] * 6)
    for dataset in ("shapes", "pydoc"):
        steps = {name: step_of(name, dataset) for name in NAMES}
        seconds = median_seconds({name: step for name, (step, _) in steps.items()})
        memory = {name: int(subprocess.check_output(
            [sys.executable, __file__, "--memory-of", name, dataset])) for name in NAMES}
        for name in NAMES:
            print_row(name, dataset, f"{steps[name][1] / seconds[name]:.0f}",
                      f"{seconds[name] / seconds[STATIC]:.2f}", f"{memory[name]:,}",
                      f"{memory[name] / memory[STATIC]:.2f}")


@torch.no_grad()
def token(density=0.27):
    """One token through one MLP C -> 4 C -> C whose first product runs in full: the second product over
    all neurons, over those that fired by index_select, and by `sparse_product`."""
    print_row("width", "dense, us", "columns selected / dense", "sparse_product / dense")
    print_row(*["---"] * 4)
    for width in (96, 192, 384, 768, 1024):
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        x, rows = torch.randn(1, width), down.weight.t().contiguous()
        up.bias -= up(torch.randn(1000, width)).quantile(1 - density, 0)        # so many fire

        def selected():
            h = up(x).relu()
            fired = h[0].nonzero()[:, 0]
            return h[:, fired] @ rows.index_select(0, fired) + down.bias

        runs = dict(dense=lambda: down(up(x).relu()), selected=selected,
                    bag=lambda: scripts[STATIC].sparse_product(up(x).relu(), rows) + down.bias)
        assert all(torch.allclose(run(), runs["dense"](), atol=1e-4) for run in runs.values())
        seconds = median_seconds(runs, 300)
        print_row(width, f"{1e6 * seconds['dense']:.0f}",
                  *(f"{seconds[name] / seconds['dense']:.2f}" for name in ("selected", "bag")))


def experts(tokens=16384, width=48):
    """A layer of eight experts of the width, of which a token runs 1.25, and half a shared one."""
    layer = scripts["moe"].Experts(width, 8, width)
    x, weight = torch.randn(tokens, width), torch.rand(tokens, 8) * (torch.rand(tokens, 8) < 1.25 / 8)

    def mlp(hidden):
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    modules = {"dispatch": lambda x: layer.dispatch(x, weight), "all experts": lambda x: layer(x, weight),
               "dense, equal MACs": mlp(round(1.75 * width)), "dense, hidden 4 x width": mlp(4 * width)}
    leaf = x.clone().requires_grad_()

    def both(module):
        module(leaf).sum().backward()
    print_row("layer", "forward, ms", "forward and backward, ms")
    print_row(*["---"] * 3)
    with torch.no_grad():
        forward = median_seconds({name: lambda m=m: F.relu(m(x)) for name, m in modules.items()})
    backward = median_seconds({name: lambda m=m: both(m) for name, m in modules.items()})
    for name in modules:
        print_row(name, f"{1e3 * forward[name]:.1f}", f"{1e3 * backward[name]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = dict(training=training, token=token, experts=experts)
    parser.add_argument("--table", choices=tables, default="training", help="default: training")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        step = step_of(*args.memory_of)[0]
        for _ in range(3):
            step()
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())   # Linux only
        print(int(peak[1]) // 1024)
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
        tables[args.table]()
