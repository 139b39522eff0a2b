"""The exact counters, against numbers worked out by hand."""

import torch
from torch import nn

from dropbp_kernels.measure import PeakLiveBytes, num_autograd_nodes, saved_bytes


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    linear, x = nn.Linear(4, 4, bias=False), torch.randn(8, 4)
    with saved_bytes() as saved:
        y = linear(x) + linear(x)  # both save x (128 bytes); the second use needs no new storage
    assert y.requires_grad
    assert saved.num_bytes == 8 * 4 * 4


def test_saved_bytes_of_a_view_is_that_of_its_storage():
    x = torch.randn(6, 4, requires_grad=True).exp()
    with saved_bytes() as saved:
        x[:2].square()
    assert saved.num_bytes == 6 * 4 * 4


def test_saved_bytes_keeps_nothing_alive():
    w = torch.randn(1000, requires_grad=True)
    with PeakLiveBytes() as live, saved_bytes() as saved:
        for _ in range(5):
            w.exp()  # saves its result, which dies with the graph at the end of the line
    assert saved.num_bytes == 5 * 4000
    assert live.peak_bytes == 4000


def test_peak_live_bytes_sees_the_peak_and_the_release():
    with PeakLiveBytes() as live:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000 live
        del a
        c = b.view(10, 100)  # a view allocates nothing
        assert live.live_bytes == 4000
        b.add_(1)
        d = torch.zeros(500)  # 6000 live
    assert live.peak_bytes == 8000
    assert live.live_bytes == 6000
    del b, c, d
    assert live.live_bytes == 0


def test_peak_live_bytes_ignores_what_was_there_before():
    x = torch.zeros(1000)
    with PeakLiveBytes() as live:
        y = x.view(10, 100)
        x.add_(1)
    assert y.shape == (10, 100)
    assert live.peak_bytes == 0


def test_peak_live_bytes_takes_a_meta_tensor_for_a_shape():
    with PeakLiveBytes() as live:
        torch.empty(1000, device="meta") * 2
    assert live.peak_bytes == 0


def test_peak_live_bytes_covers_the_backward():
    w = torch.randn(100, requires_grad=True)
    with PeakLiveBytes() as live:
        w.exp().sum().backward()  # exp saves its result (400 bytes), which lives beside the new gradient (400)
        assert live.live_bytes == 400
    assert 800 <= live.peak_bytes < 1200


def test_num_autograd_nodes():
    x = torch.randn(3, requires_grad=True)
    assert num_autograd_nodes(x) == 0
    assert num_autograd_nodes(x.exp()) == 1
    y = x.exp()
    assert num_autograd_nodes(y + y, y.sin()) == 3
    assert num_autograd_nodes(x.detach().exp()) == 0
