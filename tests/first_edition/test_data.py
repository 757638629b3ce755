"""The loaders, on small archives in the official format that the tests write themselves."""
import hashlib
import io
import tarfile
import urllib.error

import numpy as np
import pytest
import torch

from first_edition.conftest import NAMES, scripts

script = scripts[NAMES[0]]       # the data block is the same in all, as test_shared_blocks.py checks
MEMBERS = [f"cifar-10-batches-bin/{n}.bin"
           for n in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]]


@pytest.fixture(scope="module")
def records():
    """60,000 records in the official layout: every pixel of record i is i % 251, its label i % 10."""
    rows = np.repeat((np.arange(60000) % 251).astype(np.uint8)[:, None], 3073, 1)
    rows[:, 0] = np.arange(60000) % 10
    return rows


def write_archive(folder, members, monkeypatch):
    """An archive of {name: bytes} where the loader looks, its checksum taken for the official one."""
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(script, "CIFAR10", (path.name, "http://nowhere.invalid/x", "md5", md5))
    return path


def test_cifar10_from_the_archive_and_unpacked(tmp_path, records, monkeypatch):
    parts = {n: records[i * 10000:(i + 1) * 10000].tobytes() for i, n in enumerate(MEMBERS)}
    write_archive(tmp_path, {"../escape.bin": b"x", "/tmp/absolute.bin": b"y"} | parts, monkeypatch)
    assert np.array_equal(script.read_cifar10(tmp_path), records)
    assert [p.name for p in tmp_path.iterdir()] == ["cifar-10-binary.tar.gz"]   # nothing was unpacked
    assert not (tmp_path.parent / "escape.bin").exists()

    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    cfg = script.Config(dataset="cifar10", size="tiny", data=str(tmp_path), device="cpu")
    data = script.load_data(cfg)
    assert [len(split[0]) for split in data[:3]] == [45000, 5000, 10000]
    assert torch.equal(data.test[1], torch.arange(10000) % 10)
    assert data.test[0][7].unique().item() == 50007 % 251
    assert data.sha256 == hashlib.sha256(
        records[50000:, 1:].tobytes() + records[50000:, 0].astype(np.int64).tobytes()).hexdigest()

    (tmp_path / MEMBERS[5]).write_bytes(parts[MEMBERS[5]][:-1])
    with pytest.raises(script.UserError, match="test_batch.bin .* truncated or altered"):
        script.read_cifar10(tmp_path)
    (tmp_path / MEMBERS[5]).write_bytes(b"\x0a" + parts[MEMBERS[5]][1:])        # label 10
    with pytest.raises(script.UserError, match="truncated or altered"):
        script.read_cifar10(tmp_path)
    (tmp_path / MEMBERS[2]).unlink()
    with pytest.raises(script.UserError, match="lacks a file"):
        script.read_cifar10(tmp_path)


def test_wrong_archives_are_refused(tmp_path, records, monkeypatch):
    small = {name: b"\0" for name in MEMBERS}
    path = write_archive(tmp_path, small, monkeypatch)
    with pytest.raises(script.UserError, match="truncated or altered"):
        script.read_cifar10(tmp_path)                       # right names, wrong lengths
    whole = path.read_bytes()
    for broken in (whole[:-10], whole[:20] + bytes([whole[20] ^ 1]) + whole[21:]):
        path.write_bytes(broken)
        with pytest.raises(script.UserError, match="md5 differs"):
            script.read_cifar10(tmp_path)
    write_archive(tmp_path, {n.replace("test", "tset"): b"\0" for n in MEMBERS}, monkeypatch)
    with pytest.raises(script.UserError, match="lacks a file"):
        script.read_cifar10(tmp_path)
    with tarfile.open(path, "w:gz") as archive:             # a link in the place of a file
        for name in MEMBERS:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    monkeypatch.setattr(script, "CIFAR10", (
        path.name, "", "md5", hashlib.md5(path.read_bytes()).hexdigest()))
    with pytest.raises(script.UserError, match="lacks a file"):
        script.read_cifar10(tmp_path)


def test_a_partial_download_never_passes_for_a_whole_file(tmp_path, monkeypatch):
    whole = bytes(range(256)) * 40
    source = ("file.bin", "http://nowhere.invalid/file.bin", "sha256", hashlib.sha256(whole).hexdigest())

    def breaks_off(url, path, hook):
        path.write_bytes(whole[:1000])
        raise urllib.error.ContentTooShortError("retrieval incomplete", None)

    def succeeds(url, path, hook):
        hook(1, len(whole), len(whole))
        path.write_bytes(whole)

    monkeypatch.setattr(script.urllib.request, "urlretrieve", breaks_off)
    with pytest.raises(script.UserError, match="by hand.*--dataset shapes"):
        script.fetch(tmp_path, *source)
    assert not list(tmp_path.iterdir())

    def finds_another(url, path, hook):
        """While this one loads, another process loads the same, and is done first."""
        with path.open("wb") as file, monkeypatch.context() as patch:
            file.write(whole[:1000])
            patch.setattr(script.urllib.request, "urlretrieve", succeeds)
            patch.setattr(script.os, "getpid", lambda: 1)
            script.fetch(tmp_path, *source)
            file.write(whole[1000:])

    monkeypatch.setattr(script.urllib.request, "urlretrieve", finds_another)
    assert script.fetch(tmp_path, *source).read_bytes() == whole
    (tmp_path / "file.bin").unlink()
    monkeypatch.setattr(script.urllib.request, "urlretrieve", succeeds)
    assert script.fetch(tmp_path, *source).read_bytes() == whole        # simply run again
    monkeypatch.setattr(script.urllib.request, "urlretrieve", breaks_off)
    assert script.fetch(tmp_path, *source).read_bytes() == whole        # and no download once there
    (tmp_path / "file.bin").write_bytes(whole[:-1])
    with pytest.raises(script.UserError, match="sha256 differs"):
        script.fetch(tmp_path, *source)


def test_shakespeare_splits(tmp_path, monkeypatch):
    """The customary 90 / 10 split, calibration the last 5 % of the first part, targets one on."""
    text = bytes(np.random.default_rng(0).integers(32, 127, 20000).astype(np.uint8))
    (tmp_path / "tinyshakespeare.txt").write_bytes(text)
    monkeypatch.setattr(script, "SHAKESPEARE", (
        "tinyshakespeare.txt", "", "sha256", hashlib.sha256(text).hexdigest()))
    cfg = script.Config(dataset="shakespeare", size="tiny", data=str(tmp_path), device="cpu")
    data = script.load_data(cfg)
    assert bytes(data.train[0].numpy()) == text[:17100]
    assert bytes(data.calibration[0].flatten().numpy()) == text[17100:18000][:14 * 64]
    x, y = data.test
    assert x.shape == y.shape == (31, 64)
    assert bytes(x.flatten().numpy()) == text[18000:18000 + 31 * 64]
    assert bytes(y.flatten().numpy()) == text[18001:18001 + 31 * 64]
    batches = script.training_batches(data, cfg)
    for _ in range(10):                                     # windows of the training part, one on
        x, y = next(batches)
        assert x.shape == y.shape == (64, 64) and x.dtype == y.dtype == torch.int64
        window = torch.cat([x[0], y[0, -1:]]).to(torch.uint8)
        assert bytes(window.numpy()) in text[:17100] and torch.equal(x[0, 1:], y[0, :-1])


def test_pydoc_is_there_on_every_python():
    data = script.load_data(script.Config(dataset="pydoc", size="tiny", device="cpu"))
    assert len(data.train[0]) > 200000 and data.train[0].max() < 128
    assert torch.equal(data.test[0].flatten()[1:], data.test[1].flatten()[:-1])


@pytest.fixture(scope="module")
def shapes():
    return script.load_data(script.Config(dataset="shapes", size="tiny", device="cpu"))


def test_shapes_are_balanced_and_repeatable(shapes):
    assert [len(split[0]) for split in shapes[:3]] == [20000, 1000, 4000]
    assert shapes.train[0].dtype == torch.uint8 and shapes.train[0].shape[1:] == (3, 32, 32)
    counts = torch.bincount(shapes.train[1])
    assert len(counts) == 10 and counts.min() > 1800
    assert shapes.difficulty.shape == (4000,) and 0 <= shapes.difficulty.min() < 0.01
    assert 0.99 < shapes.difficulty.max() <= 1
    first, second = script.draw_shapes(500, 3), script.draw_shapes(500, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert not np.array_equal(first[0], script.draw_shapes(500, 4)[0])


def test_shapes_fade_with_difficulty(shapes):
    """Neighbouring pixels of an easy image agree (flat colours); those of a hard one are noise."""
    x = shapes.test[0].float() / 255
    roughness = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)).numpy()
    easy, hard = shapes.difficulty < 0.2, shapes.difficulty > 0.8
    assert roughness[hard].mean() > 3 * roughness[easy].mean()


def test_training_batches_shift_and_flip(shapes):
    """Each epoch shows every image once; each is a crop, or mirrored crop, of the padded original."""
    cfg = script.Config(dataset="shapes", size="tiny", device="cpu", batch=100)
    data = shapes._replace(train=(shapes.train[0][:300], torch.arange(300)))
    batches, seen, changed = script.training_batches(data, cfg), [], 0
    for _ in range(3):
        x, y = next(batches)
        seen += y.tolist()
        for image, index in zip(x, y):
            original = script.network_input(shapes.train[0][index][None])
            padded = torch.nn.functional.pad(original, (4, 4, 4, 4), "reflect")[0]
            crops = [v[:, r:r + 32, c:c + 32] for v in (padded, padded.flip(2))
                     for r in range(9) for c in range(9)]
            assert any(torch.equal(image, crop) for crop in crops)
            changed += not torch.equal(image, original[0])
    assert sorted(seen) == list(range(300)) and changed > 250
    again = next(script.training_batches(data, cfg))
    assert again[1].tolist() == seen[:100]                  # the seed decides
    cfg.seed = 1
    assert next(script.training_batches(data, cfg))[1].tolist() != seen[:100]
