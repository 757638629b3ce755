"""What the tests share: the scripts, small untrained models of each, and the real command line."""
import ast
import functools
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NAMES = ["relu_sparsity", "early_exit", "gumbel_gates", "moe", "token_boost"]
scripts = {name: importlib.import_module(name) for name in NAMES}
draw_once = functools.lru_cache(scripts[NAMES[0]].draw_shapes)      # the same code in every script
for module in scripts.values():
    module.draw_shapes = draw_once

@pytest.fixture(params=("shapes", "pydoc"))
def dataset(request):
    """Images and text in turn."""
    return request.param

@pytest.fixture
def run(monkeypatch, capsys):
    """run(name, *options, cwd=folder) -> exit status, stdout, stderr of the command, in this process."""
    def run_command(name, *options, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
        status = 0
        try:
            *_, last = ast.parse((ROOT / f"{name}.py").read_text()).body        # if __name__ == ...
            exec(compile(ast.Module(last.body, []), f"{name}.py", "exec"), vars(importlib.import_module(name)))
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return run_command

@pytest.fixture
def shorten(monkeypatch):
    """shorten(script, count): its runs calibrate and test on so many examples, and are not timed."""
    def shorten_script(script, count):
        load_data = script.load_data

        def load_few(cfg):
            data = load_data(cfg)
            for name in ("calibration", "test"):
                data[name] = tuple(part[:count] for part in data[name])
            if "difficulty" in data:
                data["difficulty"] = data["difficulty"][:count]
            return data

        monkeypatch.setattr(script, "load_data", load_few)
        monkeypatch.setattr(script, "wall_clock", lambda *arguments: {
            f"{run}_ms_batch_{batch}": 1.0 for run in ("static", "skipping") for batch in (1, 256)})
    return shorten_script

def configure(script, dataset="shapes", size="tiny", *options):
    """Options, as from a command line; tiny networks of two blocks are enough to count by hand."""
    depth = ["--depth", "3" if script.SCRIPT == "moe" else "2"] if size == "tiny" else []
    return script.options(["--dataset", dataset, "--size", size, "--device", "cpu", *depth, *options])

def steps(count, dataset="pydoc"):
    """The option that makes a tiny run take so many training steps."""
    cfg = configure(scripts[NAMES[0]], dataset)
    windows = len(scripts[NAMES[0]].load_data(cfg)["train"][0])
    examples = windows / cfg.tokens if cfg.text else windows
    return "--epochs", str((count - 0.5) * cfg.batch / examples)

def build(script, dataset="shapes", size="tiny", *options, seed=0):
    """An untrained Model to evaluate: batch norms have seen data, and nothing is zero from the start."""
    torch.manual_seed(seed)
    model = script.Model(configure(script, dataset, size, *options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.std() < 0.01:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if dataset in ("shapes", "cifar10"):
            model.train()
            model.net.embed(inputs(dataset, size, 32))
    return model.eval()

def trained(script, count, *options):
    """A tiny model after so many steps on text, the data, and a hundred windows to test on."""
    torch.manual_seed(0)
    cfg = configure(script, "pydoc", "tiny", *steps(count), *options)
    data, model = script.load_data(cfg), script.Model(cfg)
    script.train(model, data, cfg)
    return model, data, [part[:100] for part in data["test"]]

def inputs(dataset, size="tiny", count=8, dtype=torch.float32):
    """(count, 3, 32, 32) images, bytes with fractions, or (count, T) characters, drawn at random."""
    generator = torch.Generator().manual_seed(1)
    if dataset in ("shakespeare", "pydoc"):
        tokens = configure(scripts[NAMES[0]], dataset, size).tokens
        return torch.randint(32, 127, (count, tokens), generator=generator)
    return 255 * (0.47 + 0.25 * torch.randn(count, 3, 32, 32, generator=generator).to(dtype))

def thresholds(model, x, shares=(0.0, 0.4, 0.8, 1.0)):
    """Thresholds that take about these shares of the way from the cheapest model to the full one."""
    def spend(threshold):
        with torch.no_grad():
            return model.masked(x[:2], threshold)[1].double().mean()

    ends, found = (spend(model.cheapest), spend(model.full)), []
    for share in shares:
        cheap, full = model.cheapest, model.full
        for _ in range(14 if 0 < share < 1 else 0):
            middle = np.sinh((np.arcsinh(cheap) + np.arcsinh(full)) / 2)    # the ends may be far
            wanted = ends[0] + share * (ends[1] - ends[0])
            cheap, full = (middle, full) if spend(middle) < wanted else (cheap, middle)
        found.append(cheap if share < 1 else full)
    return found
