"""A backward writes into a gradient that it was given only where nobody can tell. permuted_rms_norm does.

See test_permuted_norm.py for whole networks of it.
"""

import threading

import numpy as np
import pytest
import torch
from owners import HOLDERS, NEEDS_COUNTS, leaf, norm_overwrites
from torch.autograd.function import once_differentiable

from dropbp_kernels import ownership
from dropbp_kernels.derivative import first_derivative

pytestmark = NEEDS_COUNTS


def test_a_gradient_of_nobody_else_is_overwritten():
    assert norm_overwrites()
    found = []
    thread = threading.Thread(target=lambda: found.append(norm_overwrites()))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize("holder", sorted(set(HOLDERS) - {"another graph"}))
def test_no_gradient_that_someone_holds_is_overwritten(holder):
    held, before = [], []

    def keep(grad):
        held.append(HOLDERS[holder](grad))
        before.append(grad.tolist())

    assert not norm_overwrites(lambda stream: stream.register_hook(keep))
    if isinstance(held[0], torch.Tensor) and held[0].shape == (4, 3, 6):
        assert held[0].tolist() == before[0]


def test_no_gradient_that_a_node_waits_for_is_overwritten():
    assert not norm_overwrites(follow=lambda stream, earlier: (stream + earlier) * 2)


def test_no_gradient_of_the_caller_is_overwritten():
    assert not norm_overwrites(follow=lambda stream, earlier: stream)


def test_no_gradient_in_the_memory_of_an_array_is_overwritten():
    array = np.ones((4, 3, 6), np.float32)
    assert not norm_overwrites(lambda stream: stream.register_hook(lambda grad: torch.from_numpy(array)))
    assert (array == 1).all()


@pytest.mark.parametrize("decorate", [once_differentiable, first_derivative, lambda backward: backward])
@pytest.mark.parametrize("holds", [False, True])
def test_a_backward_decorated_otherwise_than_the_probe_never_overwrites(decorate, holds):
    """Each decorator may hold the gradient too, or one time less than expected: then a shared one would look free."""
    found, held = [], []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        @decorate
        def backward(ctx, grad):
            found.append(ownership.owns_gradient(grad))
            held.append([grad] if holds else None)
            found.append(ownership.owns_gradient(grad))
            return grad

    (Asks.apply(leaf()) * 2).backward(torch.ones(4, 6))
    is_the_probes = decorate is first_derivative
    assert found == [is_the_probes, is_the_probes and not holds]
