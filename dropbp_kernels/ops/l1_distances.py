"""How far apart the features of examples are: all pairs, by the sum of absolute differences."""

import torch
from torch import Tensor

from .checks import check_dtype
from .raw import raw as _raw


def l1_distances(features: Tensor) -> Tensor:
    """Return the L1 distances of all pairs of rows: result[i, j] = sum over h of |features[i, h] - features[j, h]|.

    Symmetric and zero on the diagonal, bit for bit, unless features are infinite or NaN. It has no gradient: features
    are constants. For `coreset.facility_location` pass distances.max() - distances.

    Shapes: features (B, h); result (B, B).
    Dtypes: float32, float16, bfloat16, float64; result float32, float64 for float64 features, summed in it.
    Errors: ValueError when features are no matrix, TypeError when the dtype is unsupported.
    Cost:   B * B * h differences on a GPU, half of them on a CPU; reads features, in tiles; allocates the result. Saves
            nothing.
    Source: CoLM (arXiv 2407.19580), section 4; oracle reference.l1_distances_reference, which is torch.cdist.
    """
    check_dtype("features", features.dtype)
    if features.dim() != 2:
        raise ValueError(f"features: expected shape (B, h), got {tuple(features.shape)}")
    return _raw.l1_distances(features.detach())


@torch.library.register_fake("dropbp_kernels::l1_distances")
def _(features: Tensor) -> Tensor:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.new_empty((features.shape[0], features.shape[0]), dtype=dtype)
