"""Products of our own under autocast: the dtype that torch.nn.functional.linear has; nothing on devices without it."""

import pytest
import torch
import torch.nn.functional as F

from dropbp_kernels.autocast import is_autocast_on, product_dtype, without_autocast
from dropbp_kernels.lora import lora_linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("cast_to", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_dtype_is_that_of_a_linear_layer(dtype, cast_to):
    x = torch.ones(2, 4, dtype=dtype)
    with torch.autocast("cpu", cast_to, enabled=cast_to is not None):
        assert product_dtype(x) is F.linear(x, x).dtype
        assert is_autocast_on("cpu") == (cast_to is not None)


def test_autocast_is_off_within_and_on_again_behind():
    x = torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast("cpu"):
            assert F.linear(x, x).dtype is torch.float32
        assert F.linear(x, x).dtype is torch.bfloat16
    with without_autocast("cpu"):
        assert not is_autocast_on("cpu")


def test_devices_without_autocast():
    x = torch.ones(3, 4, device="meta")
    assert not is_autocast_on("meta")
    assert product_dtype(x) is torch.float32
    with without_autocast("meta"):
        assert F.linear(x, x).dtype is torch.float32
    y = lora_linear(x, x.new_ones(5, 4), None, x.new_ones(2, 4), x.new_ones(5, 2))
    assert (y.shape, y.device.type) == ((3, 5), "meta")


@pytest.mark.parametrize("cast_to", [None, torch.bfloat16])
def test_compiled_in_one_graph(cast_to):
    @torch.compile(backend="eager", fullgraph=True)
    def double(x):
        dtype = product_dtype(x)
        with without_autocast(x.device.type):
            return F.linear(x.to(dtype), x.to(dtype))

    with torch.autocast("cpu", cast_to, enabled=cast_to is not None):
        assert double(torch.ones(2, 4)).dtype is (cast_to or torch.float32)
