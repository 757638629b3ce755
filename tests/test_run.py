"""The real command at --size tiny: its log, its picture, its errors, and what a kill leaves behind."""
import hashlib
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from conftest import NAMES, ROOT, build, configure, scripts, steps, trained

OPTIONS = ("--size", "tiny", "--device", "cpu", "--seed", "7")
folders = {}
load_all = scripts[NAMES[0]].load_data          # the same code in all; this one is never shortened

@pytest.fixture(params=NAMES)
def finished(request, dataset, run, shorten, tmp_path_factory):
    """A run that ended well, on 300 examples of each split: name, dataset, folder, what it printed."""
    name = request.param
    if (name, dataset) not in folders:                  # each is run once
        shorten(scripts[name], 300)
        folder = tmp_path_factory.mktemp(name)
        more = (*steps(30, dataset), "--depth", "3", "--budget", "0.8")
        more = more[:4] if name == "relu_sparsity" else more
        status, printed, errors = run(name, "--dataset", dataset, *OPTIONS, *more, cwd=folder)
        assert status == 0, errors[-2000:]
        folders[name, dataset] = name, dataset, folder, printed
    return folders[name, dataset]

def read(path):
    with np.load(path) as log:
        return {key: log[key] for key in log.files}

def test_the_log_follows_the_schema_and_the_picture_is_there(finished):
    name, dataset, folder, printed = finished
    picture = folder / f"figures/{dataset}-tiny/{name}-s7.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 15000
    assert str(picture.relative_to(folder)) in printed and "accuracy" in printed
    assert len([p for p in folder.rglob("*") if p.is_file()]) == 3          # log, weights, picture
    log = read(folder / f"logs/{dataset}-tiny/{name}-s7.npz")
    meta = json.loads(str(log["meta"]))
    text = dataset == "pydoc"
    N, S = len(log["macs"]), len(log["sweep_threshold"])
    each = (N, 64) if text else (N,)
    shapes = dict(label=(each, np.uint8), prediction=(each, np.uint8), loss=(each, np.float16),
                  macs=((N,), np.int64),
                  sweep_threshold=((S,), np.float64), sweep_macs=((S, N), np.int64),
                  sweep_loss=((S, N), np.float16), sweep_correct=((S, N), np.float16), meta=((), None))
    if text:
        shapes["token_macs"] = each, np.int32
    else:
        shapes["difficulty"] = (N,), np.float32
        assert N == 300
    assert set(log) == set(shapes)
    for key, (shape, dtype) in shapes.items():
        assert log[key].shape == shape and dtype in (None, log[key].dtype), key
    cfg = configure(scripts[name], dataset, "tiny", "--depth", "3")
    test = [part[:300] for part in load_all(cfg)["test"]]
    assert np.array_equal(log["label"], test[1].numpy())
    digest = hashlib.sha256(test[0].contiguous().numpy().tobytes() + test[1].contiguous().numpy().tobytes())
    assert meta["test_sha256"] == digest.hexdigest()
    assert (meta["schema"], meta["name"], meta["script"], meta["seed"]) == (3, name, name, 7)
    assert meta["static_macs"] == scripts[name].StaticNet(cfg).macs
    assert meta["batch"] == 64 and meta["width"] == 32 and meta["seconds"] > 0
    assert not {"data", "out", "load"} & set(meta)                          # nothing of this machine
    # The numbers in `meta` are those of the arrays.
    correct = log["prediction"] == log["label"]
    assert meta["at_budget"]["accuracy"] == pytest.approx(correct.mean())
    assert meta["at_budget"]["loss"] == pytest.approx(log["loss"].astype(float).mean(), abs=1e-3)
    assert meta["at_budget"]["budget"] == pytest.approx(log["macs"].mean() / meta["static_macs"])
    assert meta["full"]["accuracy"] == pytest.approx(log["sweep_correct"][-1].astype(float).mean(), abs=1e-3)
    assert log["sweep_threshold"][-1] == scripts[name].Model(cfg).full
    if name != "relu_sparsity":                                             # which has no budget
        realised = log["sweep_macs"].mean(1) / meta["static_macs"]
        apart = np.abs(realised[:-1, None] - scripts[name].BUDGETS).min(1)      # what is further is left out
        assert len(apart) and apart.max() < 0.051
    assert np.ptp(log["macs"]) > 0
    assert not text or (log["token_macs"].sum(1) <= log["macs"]).all()

def test_a_loaded_run_is_the_run(finished, run, shorten):
    """The options of the first, no training: the same log, under a name of its own; or another budget."""
    name, dataset, folder, _ = finished
    shorten(scripts[name], 300)
    weights = f"logs/{dataset}-tiny/{name}-s7.pt"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, _, errors = run(name, "--load", weights, cwd=folder)
    assert status == 0 and f"{name}_loaded: " not in errors                 # no bar of training
    first, again = (read(folder / f"logs/{dataset}-tiny/{n}-s7.npz") for n in (name, f"{name}_loaded"))
    for key in set(first) - {"meta"}:
        assert np.array_equal(first[key], again[key]), key
    if name == "early_exit":
        options = ("--load", weights, "--name", f"{name}_again", "--budget", "0.9")
        assert run(name, *options, cwd=folder)[0] == 0
        meta = json.loads(str(read(folder / f"logs/{dataset}-tiny/{name}_again-s7.npz")["meta"]))
        assert (meta["budget"], meta["depth"]) == (0.9, 3)
        assert meta["criterion"] == ("gain" if dataset == "pydoc" else "margin")
    for path in folder.rglob(f"{name}_*"):
        path.unlink()
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

class Opens:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")

def test_what_cannot_be_loaded_is_one_line(finished, run, tmp_path):
    name, dataset, folder, _ = finished
    weights = folder / f"logs/{dataset}-tiny/{name}-s7.pt"
    (tmp_path / "half.pt").write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "text.pt").write_text("weights")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(Opens(tmp_path / "opened"), tmp_path / "code.pt")            # would run when it is unpickled
    other = "shapes" if dataset == "pydoc" else "pydoc"
    for path, more in ((weights, ("--width", "64")), (weights, ("--dataset", other)), ("half.pt", ()),
                       ("text.pt", ()), ("list.pt", ()), ("code.pt", ()), ("missing.pt", ())):
        status, printed, errors = run(name, "--load", str(path), *more, cwd=tmp_path)
        assert status == 2 and "Traceback" not in errors and str(path) in errors.splitlines()[-1]
    assert not (tmp_path / "opened").exists()

@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_log(name, run, shorten, tmp_path):
    logs = []
    shorten(scripts[name], 50)
    for seed in ("3", "3", "4"):
        options = ("--dataset", "pydoc", *OPTIONS, *steps(10), "--seed", seed)
        assert run(name, *options, cwd=tmp_path)[0] == 0
        logs.append(read(tmp_path / f"logs/pydoc-tiny/{name}-s{seed}.npz"))
    for key in set(logs[0]) - {"meta"}:
        assert np.array_equal(logs[0][key], logs[1][key]), key
    assert not np.array_equal(logs[0]["loss"], logs[2]["loss"])

@pytest.mark.parametrize("stop", ("SIGKILL", "SIGINT"))
def test_a_killed_run_leaves_the_old_log(stop, tmp_path):
    """Stopped when half of the new log is written."""
    name, path = NAMES[0], tmp_path / f"logs/pydoc-tiny/{NAMES[0]}-s0.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"the old log")
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import {name} as script

def half(file, **arrays):
    file.write(b"half a log")
    file.flush()
    os.kill(os.getpid(), signal.{stop})

script.np.savez_compressed = half
script.train = lambda *arguments: 0.0
script.load_data_of_all = script.load_data
script.load_data = lambda cfg: {{name: [part[:4] for part in split]
                                for name, split in script.load_data_of_all(cfg).items()}}
script.main(script.options(["--dataset", "pydoc", "--size", "tiny", "--device", "cpu"]))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == -getattr(signal, stop), process.stderr
    assert path.read_bytes() == b"the old log"
    assert [p.name for p in path.parent.glob("*.npz")] == [path.name]

ERRORS = [
    (["--dataset", "mnist"], "invalid choice"),
    (["--nonsense"], "unrecognized arguments"),
    (["--width", "many"], "invalid int value"),
    (["--lr", "-1"], "--lr must be at least"),
    (["--epochs", "nan"], "--epochs must be"),
    (["--width", "0"], "--width must be at least 1"),
    (["--seed", "99999999999999999999"], "below a million"),
    (["--device", "cuda"], "invalid choice: 'cuda'"),
    (["--dataset", "shakespeare", "--data", "empty"], "urlopen"),
    (["--dataset", "shakespeare", "--data", "broken"], "not the published file"),
    (["--dataset", "cifar10", "--data", "broken"], "incomplete or altered"),
    (["--data", "broken/tinyshakespeare.txt"], "tinyshakespeare.txt"),
    (["--dataset", "pydoc", "--out", "broken/tinyshakespeare.txt"], "tinyshakespeare.txt"),
    (["--dataset", "pydoc", "--lr", "1e5"], "gradient not finite at step"),
    (["--dataset", "pydoc"], "logs"),               # where a file stands in the place of the folder
    (["--dataset", "pydoc"], "pydoc_data"),         # some builds of Python leave their manual out
]

@pytest.mark.parametrize("options, message", ERRORS, ids=lambda value: "".join(value)[:40])
@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_line(name, options, message, run, tmp_path, monkeypatch):
    (tmp_path / "broken/cifar-10-batches-bin").mkdir(parents=True)
    (tmp_path / "broken/tinyshakespeare.txt").write_text("To be, or")
    if message == "logs":
        (tmp_path / "logs").write_text("")
    if message == "pydoc_data":
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(scripts[name].torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")      # nobody answers there
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    status, printed, errors = run(name, "--size", "tiny", *options, cwd=tmp_path)
    assert status == 2 and "Traceback" not in printed + errors
    said = [line for line in re.split(r"[\r\n]+", errors) if line.strip() and "%|" not in line
            and "?it/s" not in line and not line.startswith(("usage: ", "fetching http"))]
    assert len(said) == 1 and said[0].startswith(f"{name}.py: ") and message in said[0]
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.pt"))

def test_stopping_with_ctrl_c(tmp_path):
    """In a process of its own: exit status 2, one line, no file left."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / f"{NAMES[0]}.py"), "--dataset", "pydoc", *OPTIONS, "--epochs", "1000"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "loss" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in errors and "stopped" in errors
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]

def test_the_static_network_learns():
    """Better than a guess from one character: the entropy of a character given the one before it."""
    script = scripts["relu_sparsity"]
    model, data, _ = trained(script, 300)
    x, y = data["calibration"]
    counts = torch.zeros(128, 128).index_put_((x.flatten().long(), y.flatten().long()),
                                              torch.ones(y.numel()), accumulate=True)
    p = counts / counts.sum()
    bigram = -(p * (p / p.sum(1, keepdim=True).clamp(1e-9)).clamp(1e-9).log()).sum()
    loss = script.evaluate(model, model.masked, (x, y), 0.0)["means"]["loss"]
    assert loss < bigram

def test_the_learning_rate_rises_and_falls(monkeypatch):
    """In a tenth of the steps, then to 0; AdamW at a fifth of Muon's; every parameter is held once."""
    script, rates, held = scripts["relu_sparsity"], {"Muon": [], "AdamW": []}, {}
    model, cfg = build(script, "pydoc"), configure(script, "pydoc", "tiny")
    monkeypatch.setattr(script, "training_batches", lambda data, cfg: iter([(0, 0)] * 100))
    model.loss = lambda x, y, progress: (sum(p.sum() for p in model.parameters()), {})
    cfg.epochs = 99.5                                           # of one batch

    def record(optimizer, args, options):
        name, group = type(optimizer).__name__, optimizer.param_groups[0]
        rates[name].append(group["lr"])
        held[name] = group["params"]

    hook = register_optimizer_step_pre_hook(record)
    script.train(model, dict(train=(torch.zeros(64 * 64), None)), cfg)
    hook.remove()
    muon = np.array(rates["Muon"])
    assert np.allclose(rates["AdamW"], muon / 5)
    assert np.allclose(muon[:10], cfg.lr * np.arange(1, 11) / 10)
    assert np.allclose(muon[10:], cfg.lr * np.arange(90, 0, -1) / 90)
    assert sorted(map(id, held["Muon"] + held["AdamW"])) == sorted(map(id, model.parameters()))

@pytest.mark.parametrize("name", NAMES[1:4])
def test_one_block_is_too_few_where_the_first_decides_nothing(name, run, tmp_path):
    status, _, errors = run(name, "--depth", "1", cwd=tmp_path)
    assert status == 2 and "--depth" in errors.splitlines()[-1]
