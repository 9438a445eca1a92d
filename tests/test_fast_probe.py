"""The fast probe: heads side by side do what heads alone do, and judge embeddings as the exact probe does."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hear_ssam import fast_probe
from hear_ssam.fast_probe import _Heads, coordinates, row_space, run_fast_probe
from hear_ssam.probe import HeadConfig, build_head, count_heads, named_protocol, run_probe
from hear_ssam.tasks import read_task

from .test_probe import write_embeddings


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_stacked_heads_equal_single_heads(layers):
    """Without dropout: outputs, gradients and running statistics of every head are its own."""
    torch.manual_seed(0)
    config = HeadConfig(hidden_layers=layers, hidden_dim=6, dropout=0.0)
    singles = [build_head(5, 3, config) for _ in range(4)]
    heads = _Heads(singles, [0.0] * 4, torch.float32, torch.zeros(5))
    x, target = torch.randn(9, 5), torch.randint(3, (9,))
    together = heads(x)
    torch.stack([F.cross_entropy(logits, target) for logits in together]).sum().backward()
    for number, single in enumerate(singles):
        alone = single(x)
        torch.testing.assert_close(together[number], alone)
        F.cross_entropy(alone, target).backward()
        assert_same_gradients(heads, number, single)
        snapshot = heads.snapshot(number)
        assert snapshot.keys() == single.state_dict().keys()
        for name, tensor in single.state_dict().items():
            if "num_batches" not in name:
                torch.testing.assert_close(snapshot[name], tensor, msg=name)


def assert_same_gradients(heads, number, single, **tolerance):
    for name, parameter in single.named_parameters():
        ours = getattr(heads, name.replace(".", "_")).grad
        if name in heads.fixed:  # a bias before batch normalisation
            assert ours is None and parameter.grad.abs().max() < 1e-6
        else:
            torch.testing.assert_close(ours[number], parameter.grad, msg=name, **tolerance)


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("low_rank", [False, True])
def test_centred_rows_train_the_same_head(layers, low_rank):
    """Outputs, running statistics and gradients are those of the rows as they are."""
    torch.manual_seed(0)
    offset = 10 * torch.randn(50)
    x, target = torch.randn(40, 2) @ torch.randn(2, 50), torch.randint(3, (40,))
    basis = row_space([x[:30] + offset, x[30:] + offset]) if low_rank else None
    assert not low_rank or basis.shape == (2, 50)
    config = HeadConfig(hidden_layers=layers, hidden_dim=6, dropout=0.0)
    singles = [build_head(50, 3, config).double() for _ in range(2)]
    basis = basis.double() if low_rank else None
    heads = _Heads(singles, [0.0] * 2, torch.float64, offset.double(), basis)
    x = x.double()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if low_rank else {}  # the basis is float32
    for training in (True, False):
        heads.train(training).zero_grad()
        together = heads(x if basis is None else coordinates(x, basis, torch.float64))
        torch.stack([F.cross_entropy(logits, target) for logits in together]).sum().backward()
        for number, single in enumerate(singles):
            single.zero_grad()
            alone = single.train(training)(x + offset)
            torch.testing.assert_close(together[number], alone, **tolerance)
            F.cross_entropy(alone, target).backward()
            state = heads.snapshot(number)
            for name in state:
                if "running" in name:
                    torch.testing.assert_close(state[name], single.state_dict()[name], **tolerance)
            if training:
                assert_same_gradients(heads, number, single, **tolerance)


def test_rows_of_full_rank_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(fast_probe, "BLOCK", 25)
    torch.manual_seed(0)
    assert row_space([torch.randn(60, 50)]) is None
    low = torch.randn(60, 2) @ torch.randn(2, 50) + 10
    assert row_space([low]).shape == (2, 50)
    assert row_space([low, torch.randn(40, 50)]) is None  # every part counts
    assert row_space([low + 1e-3 * torch.randn(60, 50)]) is None
    assert row_space([torch.ones(60, 50)]).shape == (0, 50)


def test_large_directions_do_not_drown_small_ones():
    """A direction that is 1000 times as large as another may be rounded by less than that."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(50, 2))[0].mT
    wanted = torch.randn(60, 2) * torch.tensor([1000.0, 1.0])
    found = coordinates(wanted @ basis, basis, torch.bfloat16).float()
    assert found.shape == (60, 4)
    for direction in torch.eye(2):
        seen = found @ direction.repeat(2)
        torch.testing.assert_close(seen, wanted @ direction, rtol=0, atol=0.02)
    assert (found[:, 0] - wanted[:, 0]).abs().max() > 1  # one rounded number would not do


def test_each_head_drops_its_own_share():
    heads = _Heads(
        [build_head(4, 2, HeadConfig(hidden_dim=8)) for _ in range(3)], [0.0, 0.1, 0.5], torch.float32, torch.zeros(4)
    )
    mask = heads._dropout(torch.Size((4000, 3, 8)))
    dropped = (mask == 0).float().mean((0, 2))
    np.testing.assert_allclose(dropped, [0, 0.1, 0.5], atol=0.01)  # four standard errors
    np.testing.assert_allclose(mask.mean((0, 2)), 1, atol=0.02)
    kept = (mask[:, 1:] > 0).double()  # of two heads: independent, so they agree as often as chance has it
    assert (kept[:, 0] == kept[:, 1]).double().mean() == pytest.approx(0.9 * 0.5 + 0.1 * 0.5, abs=0.015)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_bfloat16_products_keep_their_gradients(layers):
    torch.manual_seed(0)
    singles = [build_head(20, 3, HeadConfig(hidden_layers=layers, hidden_dim=64, dropout=0.0)) for _ in range(2)]
    x, target = torch.randn(50, 20), torch.randint(3, (50,))
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        heads = _Heads(singles, [0.0] * 2, dtype, torch.randn(20, generator=torch.Generator().manual_seed(0)))
        torch.stack([F.cross_entropy(logits, target) for logits in heads(x)]).sum().backward()
        gradients.append([parameter.grad for parameter in heads.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        assert torch.linalg.norm(ours - expected) < 0.03 * (1 + layers) * torch.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_fused_block_is_its_reference(layers, dtype):
    """Outputs, running statistics and gradients, without dropout; means far from 0."""
    pytest.importorskip("llvmlite")
    from hear_ssam.probe_cpu import COLUMNS

    torch.manual_seed(0)
    single = build_head(20, 3, HeadConfig(hidden_layers=layers, hidden_dim=2 * COLUMNS, dropout=0.0))
    for layer in single:
        if isinstance(layer, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(layer.weight, 1, 0.3)
            torch.nn.init.normal_(layer.bias, 0, 0.3)
    x, target = torch.randn(37, 20) + 3, torch.randint(3, (37,))
    fused, reference = (_Heads([single], [0.0], dtype, torch.full((20,), 2.0)) for _ in range(2))
    assert fused.fused
    reference.fused = None
    close = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    for _ in range(2):
        outputs = [heads(x) for heads in (fused, reference)]
        torch.testing.assert_close(*outputs, rtol=close, atol=close)
        for logits in outputs:
            F.cross_entropy(logits[0], target).backward()
    for (name, ours), expected in zip(fused.named_parameters(), reference.parameters(), strict=True):
        assert torch.linalg.norm(ours.grad - expected.grad) < close * torch.linalg.norm(expected.grad), name
    for (name, ours), expected in zip(fused.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=close, atol=close, msg=name)


def test_gradients_of_what_the_fused_block_keeps():
    pytest.importorskip("llvmlite")
    from hear_ssam.probe_cpu import COLUMNS, Hidden

    torch.manual_seed(0)
    p, y = 0.3, torch.randn(60, 3 * COLUMNS)[:, COLUMNS : 2 * COLUMNS]  # rows that do not follow each other in memory
    inputs = [y.requires_grad_(), torch.rand(COLUMNS).requires_grad_(), torch.randn(COLUMNS).requires_grad_()]
    x, mean, variance = Hidden.apply(*inputs, p, 1e-5, None)
    torch.testing.assert_close(mean, y.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance, y.var(0, correction=0), rtol=1e-4, atol=1e-5)
    normal = F.batch_norm(y, None, None, *inputs[1:], training=True)
    expected = (normal * (x > 0)).relu() / (1 - p)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    gradient = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad(out, inputs, gradient) for out in (x, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_adam_in_one_pass_is_torchs():
    pytest.importorskip("llvmlite")
    from hear_ssam.probe_cpu import RoundedWeight

    torch.manual_seed(0)
    offset, start = torch.randn(48), torch.randn(5, 48)
    ours, theirs = RoundedWeight(start.clone(), offset, lr=1e-2), torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([theirs], lr=1e-2)
    for scale in (1.0, 1e-4, 0.0, 1e3, 1.0):
        theirs.grad = (scale * torch.randn(5, 48)).bfloat16().float()
        ours.rounded.grad = theirs.grad.bfloat16()
        ours.step()
        adam.step()
        torch.testing.assert_close(ours.weight, theirs.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.rounded, ours.weight.bfloat16()) and ours.rounded.grad is None
        torch.testing.assert_close(ours.times_offset, ours.weight @ offset, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_heads_with_rounded_weights_learn_the_same(layers):
    pytest.importorskip("llvmlite")
    torch.manual_seed(0)
    single = build_head(32, 3, HeadConfig(hidden_layers=layers, hidden_dim=256, dropout=0.0))
    x, target = torch.randn(40, 32), torch.randint(3, (40,))
    results = []
    for rounds in (True, False):
        heads = _Heads([single], [0.0], torch.bfloat16, torch.full((32,), 2.0))
        if rounds:
            heads.round_weights(1e-3)
        assert len(heads.rounded) == layers * rounds
        optimizer = torch.optim.Adam(heads.parameters(), lr=1e-3)
        for _ in range(5):
            heads.zero_grad()
            F.cross_entropy(heads(x)[0], target).backward()
            optimizer.step()
            for weight in heads.rounded.values():
                weight.step()
        results.append((heads(x), heads.snapshot(0)))
    (ours, state), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name].float(), tensor.float(), rtol=1e-2, atol=5e-3, msg=name)


def test_the_fused_block_keeps_no_step_alive():
    """Memory that only the garbage collector frees makes every step wait for new pages."""
    pytest.importorskip("llvmlite")
    from hear_ssam.probe_cpu import COLUMNS, Hidden

    y = torch.randn(9, COLUMNS, requires_grad=True)
    x = Hidden.apply(y, torch.ones(COLUMNS), torch.zeros(COLUMNS), 0.1, 1e-5, None)[0]
    x.sum().backward()
    watched = weakref.ref(x)
    gc.disable()
    try:
        del x
        assert watched() is None
    finally:
        gc.enable()


def test_the_fused_block_drops_its_share():
    """Each unit and row on its own: no column, row or neighbour departs from chance by more than four deviations."""
    pytest.importorskip("llvmlite")
    from hear_ssam.probe_cpu import COLUMNS, Hidden

    rows, hidden, p = 2000, 2 * COLUMNS, 0.1
    y, high = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(0)), torch.full((hidden,), 100.0)
    generator = torch.Generator().manual_seed(0)
    first, second = (Hidden.apply(y, high / 100, high, p, 1e-5, generator)[0] for _ in range(2))
    dropped = (first == 0).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 4 * deviation / (rows * hidden) ** 0.5
    assert dropped.mean(0).std() * rows**0.5 == pytest.approx(deviation, rel=0.15)
    assert dropped.mean(1).std() * hidden**0.5 == pytest.approx(deviation, rel=0.15)
    for one, other in ((dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1]), (dropped, second == 0)):
        correlation = ((one - p) * (other.double() - p)).mean() / deviation**2
        assert abs(correlation) < 4 / one.numel() ** 0.5
    kept = dropped == 0
    torch.testing.assert_close(first[kept].mean(), torch.tensor(100 / (1 - p)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_repeats_and_agrees_with_the_exact_probe(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(fast_probe, "product_dtype", lambda device: dtype)
    grid = {"task_specific_param_grid": {"hidden_dim": [256], "max_epochs": [60], "lr": [1e-2]}}
    folder = write_embeddings(tmp_path / "toy", ["fold00", "fold01", "fold02"], rows=60, evaluation_params=grid)
    state = torch.get_rng_state()
    once, again = (run_fast_probe(folder, "ssam", [0, 1], threads=threads) for threads in (1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [result.histories for result in once] == [result.histories for result in again]
    (alone,) = run_fast_probe(folder, "ssam", [1])  # on a CPU, neither company nor threads change a seed
    assert once[1].histories == alone.histories
    told = []
    exact = run_probe(folder, "ssam", 0, told.append)
    assert sum(told) == len(exact.histories) == count_heads(named_protocol("ssam"), read_task(folder))
    for result in once:
        assert [fold.fold for fold in result.folds] == [fold.fold for fold in exact.folds]
        assert len(result.histories) == len(exact.histories)
        mean, expected = (np.mean([fold.scores["top1_acc"] for fold in r.folds]) for r in (result, exact))
        assert mean == pytest.approx(expected, abs=0.1)


def test_heads_wait_for_a_core(tmp_path, monkeypatch):
    """Jobs in several processes share the cores, so however many threads they have, no more heads train than cores."""
    grid = {"task_specific_param_grid": {"hidden_dim": [16], "max_epochs": [3], "lr": [1e-2]}}
    folder = write_embeddings(tmp_path / "toy", ["fold00", "fold01", "fold02"], rows=20, evaluation_params=grid)
    free, seen, train = threading.Semaphore(2), [], fast_probe._train

    def watched(*arguments):
        seen.append(free._value)
        time.sleep(0.01)
        return train(*arguments)

    monkeypatch.setattr(fast_probe, "_train", watched)
    told = []
    results = run_fast_probe(folder, "ssam", [0, 1], threads=8, core=free, progress=told.append)
    assert sum(told) == sum(len(result.histories) for result in results)
    assert len(seen) > 4 and set(seen) <= {0, 1} and 0 in seen  # cores left while a head trains
    assert free._value == 2


def test_heads_train_together_as_alone(tmp_path, monkeypatch):
    """What a GPU does, here on the CPU."""
    monkeypatch.setattr(fast_probe, "product_dtype", lambda device: torch.float32)
    grid = {"hidden_dim": [32], "max_epochs": [60], "lr": [1e-2], "dropout": [0.0], "hidden_layers": [1, 2]}
    grids = {"task_specific_param_grid": grid}
    folder = write_embeddings(tmp_path / "toy", ["fold00", "fold01", "fold02"], rows=60, evaluation_params=grids)
    alone = run_fast_probe(folder, "ssam", [0, 1, 2])
    sizes, train = [], fast_probe._train
    monkeypatch.setattr(fast_probe, "_side_by_side", lambda device: True)
    monkeypatch.setattr(fast_probe, "_train", lambda data, t, singles: sizes.append(len(t)) or train(data, t, singles))
    together = run_fast_probe(folder, "ssam", [0, 1, 2])
    assert sizes[:2] == [3, 3] and sum(sizes[2:]) == 6
    for one, other in zip(alone, together, strict=True):
        losses = [[check["val_loss"] for history in result.histories for check in history] for result in (one, other)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)


def test_a_perfect_score_ends_training(tmp_path):
    grid = {"task_specific_param_grid": {"hidden_dim": [32], "max_epochs": [500], "lr": [1e-2]}}
    folder = write_embeddings(tmp_path / "toy", ["train", "valid", "test"], dim=30, evaluation_params=grid)
    for history in run_fast_probe(folder, "ssam", [0])[0].histories:
        scores = [check["val_score"] for check in history]
        assert scores[-1] == 1 and all(score < 1 for score in scores[:-1])
