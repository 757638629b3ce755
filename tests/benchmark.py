"""Speed and memory, as ratios: machines are noisy. One table at a time, on the CPU:

    python tests/benchmark.py training     # a step of each script beside the static one, and memory
    python tests/benchmark.py token        # zeros in one MLP, one token at a time, by width
    python tests/benchmark.py experts      # one layer of experts beside dense MLPs

Medians of runs by turns in one process (memory: a process for each), after a warm-up.
"""
import re
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from conftest import NAMES, build, configure, inputs, scripts

def medians(runs, repeats=15):
    """{name: function} -> {name: seconds}."""
    seconds = {name: [] for name in runs}
    for _ in range(3 + repeats):
        for name, function in runs.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.median(taken[3:]) for name, taken in seconds.items()}

def step_of(name, dataset):
    """A function that takes one training step at --size small."""
    script, cfg = scripts[name], configure(scripts[name], dataset, "small")
    model, x = build(script, dataset, "small").train(), inputs(dataset, "small", cfg.batch)
    y = torch.randint(10, (cfg.batch, cfg.tokens) if cfg.text else (cfg.batch,))
    matrices = [p for p in model.net.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = torch.optim.Muon(matrices, 1e-3), torch.optim.AdamW(others, 1e-3)

    def step():
        model.zero_grad()
        model.loss(x, y, 0.7)[0].backward()
        for optimizer in optimizers:
            optimizer.step()
    return step

def training():
    for dataset in ("shapes", "pydoc"):
        seconds = medians({name: step_of(name, dataset) for name in NAMES})
        peak = {name: int(subprocess.check_output([sys.executable, __file__, name, dataset])) for name in NAMES}
        for name in NAMES:
            print(f"| {name} | {dataset} | {1e3 * seconds[name]:.0f} ms | {seconds[name] / seconds[NAMES[0]]:.2f} "
                  f"of static | {peak[name] / 1024:.0f} MB | {peak[name] / peak[NAMES[0]]:.2f} of static |")

@torch.no_grad()
def token(density=0.27):
    """One token through one MLP C -> 4 C -> C whose first product runs in full: the second product over
    all neurons, over those that fired by index_select, and by `sparse_product`."""
    for width in (96, 192, 384, 768, 1024):
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        x, rows = torch.randn(1, width), down.weight.t().contiguous()
        up.bias -= up(torch.randn(1000, width)).quantile(1 - density, 0)        # so many fire

        def selected():
            h = up(x).relu()
            fired = h[0].nonzero()[:, 0]
            return h[:, fired] @ rows.index_select(0, fired) + down.bias

        runs = dict(dense=lambda: down(up(x).relu()), selected=selected,
                    bag=lambda: scripts[NAMES[0]].sparse_product(up(x).relu(), rows) + down.bias)
        assert all(torch.allclose(run(), runs["dense"](), atol=1e-4) for run in runs.values())
        seconds = medians(runs, 300)
        print(f"| width {width} | dense {1e6 * seconds['dense']:.0f} us | columns selected, of dense "
              f"{seconds['selected'] / seconds['dense']:.2f} | sparse_product {seconds['bag'] / seconds['dense']:.2f} |")

def experts(tokens=16384, width=48):
    """A layer of four experts of the width, of which a token runs 1.25, and half a shared one."""
    layer = scripts["moe"].Experts(width, 4, width)
    x, weight = torch.randn(tokens, width), torch.rand(tokens, 4) * (torch.rand(tokens, 4) < 1.25 / 4)
    modules = {"dispatch": lambda x: layer.dispatch(x, weight), "all experts": lambda x: layer(x, weight)}
    for name, hidden in (("dense, equal MACs", round(1.75 * width)), ("dense, hidden 4 x width", 4 * width)):
        modules[name] = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        forward = medians({name: lambda m=m: F.relu(m(x)) for name, m in modules.items()})
    both = medians({name: lambda m=m: m(leaf).sum().backward() for name, m in modules.items()})
    for name in modules:
        print(f"| {name} | forward {1e3 * forward[name]:.1f} ms | and backward {1e3 * both[name]:.1f} ms |")


if __name__ == "__main__":
    if sys.argv[1] in NAMES:        # a process of its own: the peak memory of three steps, kB
        step = step_of(*sys.argv[1:])
        for _ in range(3):
            step()
        print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])       # Linux only
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
        dict(training=training, token=token, experts=experts)[sys.argv[1]]()
