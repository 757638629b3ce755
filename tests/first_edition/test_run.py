"""The real command at --size tiny: its log, its picture, its errors, and what a kill leaves behind."""
import hashlib
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from first_edition.conftest import NAMES, ROOT, scripts


PAIRS = [(name, dataset) for name in NAMES for dataset in ("shapes", "pydoc")]
OPTIONS = ("--size", "tiny", "--device", "cpu")
folders = {}
load_all = scripts[NAMES[0]].load_data          # the same code in all; this one is never shortened


@pytest.fixture(params=PAIRS, ids="-".join)
def finished(request, run, shorten, tmp_path_factory):
    """A run that ended well: name, dataset, folder, what it printed. Each is run once, on three
    hundred examples of each split, and timed on images."""
    if request.param not in folders:
        name, dataset = request.param
        shorten(scripts[name], 300, timed=dataset == "shapes")
        folder = tmp_path_factory.mktemp(name)
        status, printed, errors = run(name, "--dataset", dataset, *OPTIONS, "--steps", "30",
                                      "--seed", "7", cwd=folder)
        assert status == 0, errors[-2000:]
        folders[request.param] = name, dataset, folder, printed
    return folders[request.param]


def test_the_log_follows_the_schema(finished):
    name, dataset, folder, _ = finished
    log = np.load(folder / f"logs/{dataset}-tiny/{name}-s7.npz")
    meta = json.loads(str(log["meta"]))
    text = dataset == "pydoc"
    N, S = len(log["example"]), len(log["sweep_threshold"])
    each = (N, 64) if text else (N,)
    shapes = dict(example=((N,), np.int64), label=(each, np.int64), prediction=(each, np.int64),
                  loss=(each, np.float32), macs=((N,), np.int64), token_macs=((N, 64), np.int32),
                  sweep_threshold=((S,), np.float64), sweep_macs=((S, N), np.int64),
                  sweep_loss=((S, N), np.float32), sweep_correct=((S, N), np.float32), meta=((), None))
    if dataset == "shapes":
        shapes["difficulty"] = ((N,), np.float32)
        assert N == 300
    assert set(log.files) == set(shapes)
    for key, (shape, dtype) in shapes.items():
        assert log[key].shape == shape and dtype in (None, log[key].dtype), key
    assert S >= 9 and np.array_equal(log["example"], np.arange(N))

    cfg = scripts[name].Config(dataset=dataset, size="tiny", device="cpu")
    data = load_all(cfg)
    assert meta["test_sha256"] == data.sha256 == hashlib.sha256(
        data.test[0].numpy().tobytes() + data.test[1].numpy().tobytes()).hexdigest()
    assert np.array_equal(log["label"], data.test[1].numpy()[:N])
    assert meta["schema"] == 1 and (meta["method"], meta["dataset"], meta["seed"]) == (name, dataset, 7)
    assert meta["dense_macs"] == scripts[name].Model(cfg).dense_macs
    assert meta["script_sha256"] == hashlib.sha256((ROOT / f"{name}.py").read_bytes()).hexdigest()
    assert meta["config"]["steps"] == 30 and meta["parameters"] > 10000

    # The numbers in `meta` are those of the arrays.
    correct = log["prediction"] == log["label"]
    assert meta["at_budget"]["accuracy"] == pytest.approx(correct.mean())
    assert meta["at_budget"]["loss"] == pytest.approx(log["loss"].mean(), abs=1e-5)
    assert meta["at_budget"]["budget"] == pytest.approx(log["macs"].mean() / meta["dense_macs"])
    sweep = log["sweep_macs"].mean(1)
    assert (np.diff(sweep) >= -0.001 * meta["dense_macs"]).all()           # cheapest to full
    assert sweep[0] < 0.9 * sweep[-1] and log["sweep_threshold"][-1] == scripts[name].Model.full
    assert meta["full"]["accuracy"] == pytest.approx(log["sweep_correct"][-1].mean(), abs=1e-5)
    assert np.ptp(log["macs"]) > 0 and (log["token_macs"].sum(1) <= log["macs"]).all()
    assert set(meta["wall_clock"]) == {f"{k}_ms_batch_{b}" for k in ("dense", "skipping")
                                       for b in (1, 256)}
    if meta["budget_wanted"] is not None:   # the two parts of pydoc are about different topics
        missed = abs(meta["at_budget"]["budget"] - meta["budget_wanted"])
        assert missed < (0.1 if text else 0.03)     # of 300 examples


def test_the_picture_is_there(finished):
    name, dataset, folder, printed = finished
    picture = folder / f"figures/{dataset}-tiny/{name}-s7.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 20000
    assert str(picture.relative_to(folder)) in printed and "accuracy" in printed
    left = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    assert len(left) == 2, left                                            # and nothing else


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_star_is_the_static_twin_of_this_run(name, tmp_path):
    """Trained alike, with the same seed, without a penalty, and in one piece; else there is none."""
    script = scripts[name]
    cfg = script.Config(dataset="shapes", size="tiny", device="cpu", out=str(tmp_path), seed=3)
    log = tmp_path / "logs/shapes-tiny/relu_sparsity-s3.npz"
    log.parent.mkdir(parents=True)

    def stars():
        axis = Figure().subplots()
        script.draw_curves(axis, cfg, {"all": [dict(budget=0.5, accuracy=0.7), dict(budget=1.0, accuracy=0.8)]})
        return [line.get_ydata().tolist() for line in axis.lines[1:]]

    assert stars() == []
    for change, expected in (({}, [[0.75]]), (dict(epochs=7), []), (dict(sparsity_weight=0.3), [])):
        config = dict(vars(cfg), sparsity_weight=0.0) | change
        np.savez(log, meta=json.dumps(dict(config=config, full=dict(accuracy=0.75, loss=1.0))))
        assert stars() == expected
    log.write_bytes(log.read_bytes()[:100])
    assert stars() == []


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_log(name, run, shorten, tmp_path):
    logs = []
    shorten(scripts[name], 50)
    for seed in ("3", "3", "4"):
        options = ("--dataset", "pydoc", *OPTIONS, "--steps", "10", "--seed", seed)
        assert run(name, *options, cwd=tmp_path)[0] == 0
        with np.load(tmp_path / f"logs/pydoc-tiny/{name}-s{seed}.npz") as log:
            logs.append({key: log[key] for key in log.files if key != "meta"})
    for key, first in logs[0].items():
        assert np.array_equal(first, logs[1][key]), key
    assert not np.array_equal(logs[0]["loss"], logs[2]["loss"])


@pytest.mark.parametrize("stop", ("SIGKILL", "SIGINT"))
def test_a_killed_run_leaves_the_old_log(stop, tmp_path):
    """Stopped when half of the new log is written."""
    name, path = NAMES[0], tmp_path / "log.npz"
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
cfg = script.Config(dataset="pydoc", size="tiny", device="cpu")
model, data = script.Model(cfg).eval(), script.load_data(cfg)
data = data._replace(test=[part[:4] for part in data.test])
result = script.evaluate(model.masked, data.test, model.full)
script.save_log(script.Path({str(path)!r}), cfg, data, model, None, 0.0, result, {{0.0: result}})
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -getattr(signal, stop), process.stderr
    assert path.read_bytes() == b"the old log"
    assert [p.name for p in tmp_path.glob("*.npz")] == ["log.npz"]


ERRORS = [
    (["--dataset", "mnist"], "invalid choice"),
    (["--size", "huge"], "invalid choice"),
    (["--nonsense"], "unrecognized arguments"),
    (["--steps", "many"], "invalid int value"),
    (["--lr", "-1"], "must not be negative"),
    (["--epochs", "inf"], "less than 2 ** 31"),
    (["--epochs", "nan"], "--epochs nan must"),
    (["--seed", "99999999999999999999"], "less than 2 ** 31"),
    (["--dataset", "pydoc", "--batch", "99999"], "more than the"),
    (["--device", "cuda"], "no CUDA"),
    (["--dataset", "shakespeare", "--data", "empty"], "--dataset shapes"),
    (["--dataset", "shakespeare", "--data", "broken"], "not the published file"),
    (["--dataset", "cifar10", "--data", "broken"], "lacks a file"),
    (["--data", "broken/tinyshakespeare.txt"], "is a file; a folder is expected"),
    (["--dataset", "pydoc", "--out", "broken/tinyshakespeare.txt"], "is a file; a folder is expected"),
    (["--dataset", "pydoc", "--steps", "60", "--lr", "1e9"], "not finite from step"),
    (["--dataset", "pydoc"], "logs"),               # where a file stands in the place of the folder
]


@pytest.mark.parametrize("options, message", ERRORS, ids=lambda value: "".join(value)[:40])
@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_line(name, options, message, run, tmp_path, monkeypatch):
    (tmp_path / "broken/cifar-10-batches-bin").mkdir(parents=True)
    (tmp_path / "broken/tinyshakespeare.txt").write_text("To be, or")
    if message == "logs":
        (tmp_path / "logs").write_text("")
    monkeypatch.setattr(scripts[name].torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")      # nobody answers there
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    status, printed, errors = run(name, "--size", "tiny", *options, cwd=tmp_path)
    assert status == 2 and "Traceback" not in printed + errors
    said = [line for line in re.split(r"[\r\n]+", errors) if line.startswith(f"{name}.py: ")]
    assert len(said) == 1 and message in said[0]
    bars = [line for line in re.split(r"[\r\n]+", errors) if line and line not in said]
    assert all("/s" in line or "s/" in line for line in bars), bars
    trained = message in ("more than the", "not finite from step")
    assert trained or not (tmp_path / "figures").exists()       # refused before anything is made


def test_stopping_with_ctrl_c(tmp_path):
    """In a process of its own: exit status 130, one line, no file left."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / f"{NAMES[0]}.py"), "--dataset", "pydoc", *OPTIONS,
         "--epochs", "1000"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "examples" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "stopped" in errors
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_every_option(name, run, tmp_path):
    status, printed, _ = run(name, "--help", cwd=tmp_path)
    assert status == 0 and scripts[name].__doc__.split("\n")[0] in printed
    for field in scripts[name].fields(scripts[name].Config):
        assert re.search(rf"--{field.name.replace('_', '-')}( |\n)[^-]*[a-z]{{3}}", printed), field.name
