"""The signature of every op. Read this first.

Ops are grouped by stem; a stem names one file in each room: ``ops/<stem>.py`` (public function), ``_triton/<stem>.py``,
``csrc/cpu/<stem>.cpp``, ``csrc/cuda/<stem>.cu`` (but for l1_distances), ``tests/test_<stem>.py``, and
``benchmarks/bench_<stem>.py`` (column_update is measured with partial_gather, permuted_residual_add with
permuted_norm). A raw op called ``name`` is ``torch.ops.dropbp_kernels.name``, ``reference.name_reference`` and
``_triton.<stem>.launch_name``.

The schemas stand in Python and not in C++ so that the package is whole without a compiler: the compiled libraries only
add kernels to these ops. Raw ops know nothing of autograd and never return an alias of an input.
"""

SCHEMAS = {
    "gated_residual_add": {
        # residual (R, ..., D) + branch (K, ..., D) at rows (K,) of dim 0; rows=None: same shape, all rows.
        "gated_residual_add": "(Tensor residual, Tensor branch, Tensor? rows) -> Tensor",
        "gated_residual_add_": "(Tensor(a!) residual, Tensor branch, Tensor? rows) -> ()",
        # grad_output (R, ..., D) -> grad_branch (K, ..., D) in dtype, times grad_scale, times row_scale (K,) of dim 0.
        # A row whose row_scale is zero is written as zeros without reading grad_output.
        "gated_residual_add_backward": (
            "(Tensor grad_output, Tensor? rows, Tensor? row_scale, float grad_scale, ScalarType dtype) -> Tensor"
        ),
    },
    "gated_residual_rms_norm": {
        # residual (..., D), branch (..., D), weight (D,) -> normed (..., D) in branch's dtype,
        # new_residual (..., D) in residual's dtype, rstd (...) in float32 (float64 for a float64 residual).
        # gemma=False: weight * round(x * rstd); gemma=True: round(x * rstd * (1 + weight)).
        "gated_residual_rms_norm": (
            "(Tensor residual, Tensor branch, Tensor weight, float eps, bool gemma) -> (Tensor, Tensor, Tensor)"
        ),
        # -> grad_residual (..., D) in new_residual's dtype (the norm's gradient plus grad_new_residual if given),
        # grad_weight (D,) in weight's dtype, or of size (0,) when weight_grad is False.
        "gated_residual_rms_norm_backward": (
            "(Tensor grad_normed, Tensor? grad_new_residual, Tensor new_residual, Tensor weight, Tensor rstd, "
            "bool gemma, bool weight_grad) -> (Tensor, Tensor)"
        ),
    },
    "gated_residual_layer_norm": {
        # residual (..., D), branch (..., D), weight (D,), bias (D,) of weight's dtype -> normed (..., D) in branch's
        # dtype, new_residual (..., D) in residual's dtype, mean (...), rstd (...) in float32 (float64 for a float64
        # residual). round((x - mean) * rstd * weight + bias).
        "gated_residual_layer_norm": (
            "(Tensor residual, Tensor branch, Tensor weight, Tensor? bias, float eps) "
            "-> (Tensor, Tensor, Tensor, Tensor)"
        ),
        # -> grad_residual (..., D) in new_residual's dtype (the norm's gradient plus grad_new_residual if given),
        # grad_weight, grad_bias (D,) in weight's dtype, of size (0,) when weight_grad or bias_grad is False.
        "gated_residual_layer_norm_backward": (
            "(Tensor grad_normed, Tensor? grad_new_residual, Tensor new_residual, Tensor weight, Tensor mean, "
            "Tensor rstd, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)"
        ),
    },
    # A permutation (N,) int64 orders the rows of residual; a row is an index of the leading dimensions, as few of them
    # as have N elements together (permutation.row_shape). Its first K entries are the kept rows.
    "permuted_residual_add": {
        # residual (..., D), the branch in permuted order as kept (K, ..., D) and dropped (N - K, ..., D) -> the sum in
        # residual's order and shape. Backward: gated_residual_add_backward at rows permutation[:K].
        "permuted_residual_add": "(Tensor residual, Tensor kept, Tensor dropped, Tensor permutation) -> Tensor",
    },
    "permuted_norm": {
        # residual (..., D), weight (D,), bias (D,) -> the norm of its rows in permuted order, kept (K, ..., D) and
        # dropped (N - K, ..., D) in dtype; and of the kept rows alone: rows (K, ..., D) as they were, in residual's
        # dtype, mean (K, ...), or of size (0,) if not centered, and rstd (K, ...), in float32 (float64).
        # centered: a layer norm. gemma: times 1 + weight. Neither: weight * round(x * rstd).
        "permuted_norm": (
            "(Tensor residual, Tensor weight, Tensor? bias, Tensor permutation, SymInt num_kept, float eps, "
            "bool centered, bool gemma, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
        ),
        # Adds the norm's gradient into the kept rows of grad_residual (..., D), in residual's order and dtype; touches
        # no other row. -> grad_weight (D,) and grad_bias (D,) in weight's dtype, of size (0,) where not asked for.
        "permuted_norm_backward_": (
            "(Tensor(a!) grad_residual, Tensor grad_kept, Tensor rows, Tensor weight, Tensor mean, Tensor rstd, "
            "Tensor permutation, bool centered, bool gemma, bool weight_grad, bool bias_grad) -> (Tensor, Tensor)"
        ),
    },
    "glu": {
        # activation(gate) * up, all (..., D) alike; activation: silu, gelu (by erf) or gelu_tanh; glu_ into gate.
        "glu": "(Tensor gate, Tensor up, str activation) -> Tensor",
        "glu_": "(Tensor(a!) gate, Tensor up, str activation) -> ()",
        # -> grad_gate, grad_up; glu_backward_ writes them into gate and up.
        "glu_backward": "(Tensor grad_output, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
        "glu_backward_": "(Tensor grad_output, Tensor(a!) gate, Tensor(b!) up, str activation) -> ()",
    },
    # Channels are places in the last dimension of an input, columns of a weight (out, in): index (r,) int64.
    "partial_gather": {
        # input (..., D) -> (..., r), contiguous.
        "partial_gather": "(Tensor input, Tensor index) -> Tensor",
    },
    "column_update": {
        # weight (out, in) of any strides gains scale * delta (out, r) in its columns index, all different, summed in
        # the wider of both dtypes and rounded once -> what the columns were, (out, r) in weight's dtype.
        "column_update_": "(Tensor(a!) weight, Tensor delta, Tensor index, float scale) -> Tensor",
        "column_restore_": "(Tensor(a!) weight, Tensor original, Tensor index) -> ()",
    },
    "l1_distances": {
        # features (B, h) -> (B, B) in float32, float64 for float64 features.
        "l1_distances": "(Tensor features) -> Tensor",
    },
    "rope": {
        # x (B, S, H, D), cos and sin (S, R) or (1 or B, S, R): x's channels (i, i + R/2) turned, transpose: back.
        "rope": "(Tensor x, Tensor cos, Tensor sin, bool transpose) -> Tensor",
        "rope_": "(Tensor(a!) x, Tensor cos, Tensor sin) -> ()",
    },
}
