"""Activations between blocks: what goes in comes out, from memory or from disk."""

from pathlib import Path

import pytest
import torch

from calibration.store import ActivationStore, SquareOnDisk

SHAPES = [(2, 5, 8), (2, 5, 8), (1, 5, 8), (2, 3, 8)]


def batches(dtype=torch.float32, shift=0):
    generator = torch.Generator().manual_seed(shift)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def filled(folder, budget, dtype=torch.float32):
    store = ActivationStore(folder, budget)
    for x in batches(dtype):
        store.append(x)
    return store


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("share", "spilled"), [(None, 0), (1.0, 0), (0.99, 1), (0.3, 3), (0.0, 4)])
def test_keeps_every_bit(tmp_path, dtype, share, spilled):
    expected = batches(dtype)
    expected[1][0, 0, :3] = torch.tensor([torch.nan, -0.0, torch.inf])
    total = sum(x.nbytes for x in expected)
    store = ActivationStore(tmp_path / "spill", None if share is None else int(share * total))
    for x in expected:
        store.append(x)
    assert len(store) == 4 and store.spilled == spilled
    assert (tmp_path / "spill").exists() == (spilled > 0)
    for i, (a, b) in enumerate(zip(store, expected, strict=True)):
        assert same_bits(a, b) and same_bits(store[i], b)


def test_without_a_folder_nothing_is_spilled():
    store = filled(None, 0)
    assert store.spilled == 0 and all(same_bits(a, b) for a, b in zip(store, batches(), strict=True))


@pytest.mark.parametrize("budget", [None, 0, 400, 700])
def test_replacing_batches(tmp_path, budget):
    """What a block writes back, batch by batch, while later batches are still the old ones."""
    store, old, new = filled(tmp_path / "spill", budget), batches(), batches(shift=1)
    for i in range(4):
        hidden = store[i]
        assert same_bits(hidden, old[i])
        store[i] = new[i]
        for j in range(4):
            assert same_bits(store[j], new[j] if j <= i else old[j])


def test_the_budget_counts_what_is_held(tmp_path):
    size = torch.zeros(1, 4, 8).nbytes
    store = ActivationStore(tmp_path / "spill", 2 * size)
    for _ in range(3):
        store.append(torch.zeros(1, 4, 8))
    assert store.spilled == 1
    store[0] = torch.zeros(1, 8, 8)  # twice as large: to disk, which makes room for the third
    assert store.spilled == 2
    store[2] = torch.zeros(1, 4, 8)
    assert store.spilled == 1
    for _ in range(5):  # replacing in place is no growth
        store[1] = torch.ones(1, 4, 8)
    assert store.spilled == 1


def test_two_stores_in_two_folders_do_not_mix(tmp_path):
    first, second = filled(tmp_path / "a", 0), ActivationStore(tmp_path / "b", 0)
    for x in batches(shift=3):
        second.append(x)
    assert all(same_bits(a, b) for a, b in zip(first, batches(), strict=True))
    assert all(same_bits(a, b) for a, b in zip(second, batches(shift=3), strict=True))


def test_strided_batches_and_gradients_are_stripped(tmp_path):
    x = torch.randn(8, 5, 2, requires_grad=True).permute(2, 1, 0)
    for budget in (None, 0):
        store = ActivationStore(tmp_path / "spill", budget)
        store.append(x)
        assert torch.equal(store[0], x.detach()) and not store[0].requires_grad


@pytest.mark.parametrize("budget", [None, 0])
def test_seen_from_a_device(tmp_path, budget):
    store = filled(tmp_path / "spill", budget)
    view = store.on(torch.device("cpu"))
    assert len(view) == 4 and all(same_bits(view[i], x) for i, x in enumerate(batches()))
    store[2] = batches(shift=1)[2]
    assert same_bits(view[2], batches(shift=1)[2])


@pytest.mark.parametrize("budget", [None, 0])
def test_a_batch_that_was_handed_out_keeps_its_values(tmp_path, budget):
    store = ActivationStore(tmp_path / "spill", budget)
    store.append(torch.zeros(1, 64, 64))
    held = store[0]
    store[0] = torch.ones(1, 64, 64)
    assert bool((store[0] == 1).all()) and bool((held == 0).all())


def test_a_square_on_disk_gives_rows_with_the_diagonal_as_it_is_now(tmp_path):
    matrix = torch.randn(7, 7)
    expected, stored = matrix.clone(), SquareOnDisk(matrix, tmp_path / "folder" / "H.bin")
    assert matrix.numel() == 0 and len(stored) == 7
    stored.diagonal().add_(0.5)
    expected.diagonal().add_(0.5)
    assert torch.equal(stored.diagonal(), expected.diagonal())
    for rows in (slice(None), slice(2, 5), slice(6, 9), torch.tensor([5, 0, 3])):
        assert same_bits(stored[rows], expected[rows])
    stored[:2].zero_()  # what is given is a copy
    assert same_bits(stored[:], expected)
    (tmp_path / "folder" / "H.bin").write_bytes(b"short")
    with pytest.raises(OSError, match="H.bin: became shorter while it was used"):
        stored[1:3]


def resident(path):
    """Bytes of a mapped file that are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        found += inside and line.startswith("Rss:") and 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of mapped memory")
def test_what_a_holder_has_read_of_a_spilled_batch_leaves_memory(tmp_path):
    store, x = ActivationStore(tmp_path, 0), torch.randn(64, 1024)
    store.append(x)
    held = store[0]
    for _ in range(2):
        assert same_bits(held, x) and resident(tmp_path / "batch-00000.bin") >= x.nbytes
        store.let_go(0)
        assert resident(tmp_path / "batch-00000.bin") == 0
    del held
    store.let_go(0)  # nobody holds it any more
    assert same_bits(store[0], x)


def test_letting_go_of_a_batch_in_memory_leaves_it_there(tmp_path):
    store, x = ActivationStore(tmp_path, None), torch.randn(64, 1024)
    store.append(x)
    store.let_go(0)
    assert same_bits(store[0], x)
