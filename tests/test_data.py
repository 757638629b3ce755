"""The loaders, on small files in the official format that the tests write themselves."""
import email.message
import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch

from conftest import NAMES, configure, scripts

script = scripts[NAMES[0]]       # the data block is the same in all, as test_shared_blocks.py checks
MEMBERS = [f"cifar-10-batches-bin/{name}.bin"
           for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]]

def refuses(message, function, *args):
    """It raises an OSError of one line that holds the message."""
    with pytest.raises(OSError, match=message) as stop:
        function(*args)
    assert "\n" not in str(stop.value)

def test_cifar10_from_the_archive_and_unpacked(tmp_path, monkeypatch):
    """In the official layout, of any checksum: every pixel of record i is i % 251, its label i % 10."""
    records = np.repeat((np.arange(60000) % 251).astype(np.uint8)[:, None], 3073, 1)
    records[:, 0] = np.arange(60000) % 10
    parts = {n: records[i * 10000:(i + 1) * 10000].tobytes() for i, n in enumerate(MEMBERS)}
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    whole = path.read_bytes()
    sha256 = hashlib.sha256(whole).hexdigest()
    monkeypatch.setattr(script, "CIFAR10", (path.name, "http://nowhere.invalid/x", sha256))
    cfg = configure(script, "cifar10", "tiny", "--data", str(tmp_path))
    for broken in (whole[:-10], whole[:20] + bytes([whole[20] ^ 1]) + whole[21:]):
        path.write_bytes(broken)
        refuses("is not the published file", script.load_data, cfg)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]          # nothing was unpacked
    path.write_bytes(whole)
    data = script.load_data(cfg)
    images, labels = (torch.cat(parts) for parts in zip(*data.values()))
    assert np.array_equal(images.flatten(1), records[:, 1:]) and np.array_equal(labels, records[:, 0])
    path.unlink()                                                           # the folder is enough
    data = script.load_data(cfg)
    assert [len(data[name][0]) for name in ("train", "calibration", "test")] == [45000, 5000, 10000]
    assert torch.equal(data["test"][1], (torch.arange(10000) % 10).byte())
    assert data["test"][0][7].unique().item() == 50007 % 251
    for broken in (parts[MEMBERS[5]][:-1], b"\x0a" + parts[MEMBERS[5]][1:], None):   # short; label 10; gone
        (tmp_path / MEMBERS[5]).write_bytes(broken) if broken else (tmp_path / MEMBERS[5]).unlink()
        refuses("incomplete or altered", script.load_data, cfg)

def test_a_partial_download_never_passes_for_a_whole_file(tmp_path, monkeypatch):
    """torch.hub does the download; here it brings a part, another file, the right one."""
    whole = bytes(range(256)) * 40
    source = ("file.bin", "http://nowhere.invalid/file.bin", hashlib.sha256(whole).hexdigest())
    path = tmp_path / "data/file.bin"

    class Response(io.BytesIO):
        def info(self):
            return email.message.Message()

    def answer(content):
        monkeypatch.setattr(torch.hub, "urlopen", lambda request: Response(content))

    for content in (whole[:1000], whole[:-1] + b"x"):
        answer(content)
        refuses("is not the published file", script.download, tmp_path / "data", *source)
        path.unlink()
    for content in (whole, b""):                                # the second time nothing is downloaded
        answer(content)
        assert script.download(tmp_path / "data", *source).read_bytes() == whole
    path.write_bytes(whole[:-1])
    refuses("is not the published file", script.download, tmp_path / "data", *source)

def test_shakespeare_splits(tmp_path, monkeypatch):
    """The customary 90 / 10 split, calibration the last 5 % of the first part, targets one on."""
    text = bytes(np.random.default_rng(0).integers(32, 127, 20000).astype(np.uint8))
    (tmp_path / "tinyshakespeare.txt").write_bytes(text)
    monkeypatch.setattr(script, "SHAKESPEARE", (
        "tinyshakespeare.txt", "", hashlib.sha256(text).hexdigest()))
    cfg = configure(script, "shakespeare", "tiny", "--data", str(tmp_path))
    data = script.load_data(cfg)
    assert data["train"][0].shape == (17100 - 64, 64)                       # windows begin anywhere
    assert bytes(data["train"][0][5].numpy()) == text[5:69]
    assert bytes(data["calibration"][0].flatten().numpy()) == text[17100:18000][:14 * 64]
    x, y = data["test"]
    assert x.shape == y.shape == (31, 64)
    assert bytes(x.flatten().numpy()) == text[18000:18000 + 31 * 64]
    assert bytes(y.flatten().numpy()) == text[18001:18001 + 31 * 64]
    batches = script.training_batches(data, cfg)
    for _ in range(10):
        x, y = next(batches)
        assert x.shape == y.shape and x.shape[1] == 64 and y.dtype == torch.int64
        window = torch.cat([x[0], y[0, -1:].byte()])
        assert bytes(window.numpy()) in text[:17100] and torch.equal(x[0, 1:], y[0, :-1])

@pytest.fixture(scope="module")
def shapes():
    return script.load_data(configure(script, "shapes"))

def test_shapes_are_balanced_and_repeatable_and_fade_with_difficulty(shapes):
    """Neighbouring pixels of an easy image agree (flat colours); those of a hard one are noise."""
    assert [len(shapes[name][0]) for name in ("train", "calibration", "test")] == [10000, 1000, 4000]
    assert shapes["train"][0].dtype == torch.uint8 and shapes["train"][0].shape[1:] == (3, 32, 32)
    counts = torch.bincount(shapes["train"][1].long())
    assert len(counts) == 10 and counts.min() > 900
    (images, labels, _), again = (script.draw_shapes.__wrapped__(200) for _ in range(2))
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    difficulty = shapes["difficulty"]
    assert difficulty.shape == (4000,) and 0 <= difficulty.min() < 0.01 and 0.99 < difficulty.max() <= 1
    roughness = shapes["test"][0].float().diff().abs().mean((1, 2, 3)).numpy()
    assert roughness[difficulty > 0.8].mean() > 2 * roughness[difficulty < 0.2].mean()

def test_training_batches_shift_and_flip(shapes):
    """Each epoch shows every image once, as a crop of the padded original, flipped every other epoch."""
    cfg = configure(script, "shapes", "tiny")
    cfg.batch = 100
    data = dict(train=(shapes["train"][0][:250], torch.arange(250)))
    batches, shown, crops_seen = script.training_batches(data, cfg), [[], []], set()
    for epoch in (0, 1):
        for _ in range(3):
            x, y = next(batches)
            shown[epoch] += y.tolist()
            for image, index in zip(x, y):
                original = shapes["train"][0][index][None].float()
                padded = torch.nn.functional.pad(original, (4, 4, 4, 4), "reflect")[0]
                if (index + epoch) % 2 == 0:
                    image = image.flip(2)
                found = [(r, c) for r in range(9) for c in range(9)
                         if torch.equal(image, padded[:, r:r + 32, c:c + 32])]
                assert found
                crops_seen.update(found)
        assert sorted(shown[epoch]) == list(range(250))
    assert shown[0] != shown[1] and len(crops_seen) == 81
    again = next(script.training_batches(data, cfg))
    assert again[1].tolist() == shown[0][:100]              # the seed decides
    cfg.seed = 1
    assert next(script.training_batches(data, cfg))[1].tolist() != shown[0][:100]

def test_windows_of_an_epoch_do_not_overlap():
    """They cover the text once, but for its ends, from another place every epoch."""
    cfg = configure(script, "pydoc", "tiny")
    cfg.batch = 10
    text = torch.arange(64 * 40 + 1)
    window = text.unfold(0, 65, 1)
    batches, starts = script.training_batches(dict(train=(window[:, :-1], window[:, 1:])), cfg), set()
    for epoch in range(4):
        x, y = (torch.cat(part) for part in zip(*(next(batches) for _ in range(4))))
        assert torch.equal(y, x + 1) and len(x.unique()) == x.numel()
        starts.add(x.min().item())
    assert len(starts) > 1
