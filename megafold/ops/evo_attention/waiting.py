"""EvoAttention's gradients where logits are too large for Hopper's own kernels, found on the GPU.

Those leave a flag and nothing else then (see :mod:`~megafold.ops.evo_attention.folding`). The host
does not wait for the flag: this kernel is launched behind them, looks at it, and returns at once or
does what the three of :mod:`~megafold.ops.evo_attention.backward` do, one after the other. None of
them needs what another leaves, for delta has been found already.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.evo_attention.backward import grad_bias_kernel, grad_kv_kernel, grad_q_kernel


@triton.jit
def waiting_kernel(
    p_beyond,  # int8: 0 where the gradients are there
    p_q, p_k, p_v, p_mask, p_bias, p_out, p_stats, p_grad, p_delta,
    p_grad_q, p_grad_k, p_grad_v,  # written
    p_of_each,  # gradients of biases that rows have of their own, written; or None
    p_shared,  # that of a bias which they share, written; or None
    stride_qb, stride_qs, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gs, stride_gn, stride_gh, stride_gd,
    stride_mb, stride_ms, stride_mk,
    stride_bb, stride_bh, stride_bq, stride_bk,
    scale, rows, rows_per_bias, stride_inverse, queries, keys, heads, width,
    biases,
    of_q, of_keys, of_bias,  # how many programs the kernels would have
    STEP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    AS_OPERANDS: tl.constexpr,  # the gradients of q, k and v lie as these do
    WRAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each program takes the work of many, in turns."""
    if tl.load(p_beyond) != 0:
        for i in range(tl.program_id(0), of_q, tl.num_programs(0)):
            grad_q_kernel(
                p_q, p_k, p_v, p_mask, p_bias, p_out, p_stats, p_grad, None, p_grad_q, p_of_each,
                stride_qb, stride_qs, stride_qn, stride_qh, stride_qd,
                stride_kb, stride_ks, stride_kn, stride_kh, stride_kd,
                stride_vb, stride_vs, stride_vn, stride_vh, stride_vd,
                stride_gb, stride_gs, stride_gn, stride_gh, stride_gd,
                stride_mb, stride_ms, stride_mk, stride_bb, stride_bh, stride_bq, stride_bk,
                scale, rows, rows_per_bias, stride_inverse, queries, keys, heads, width,
                STEP, HAS_MASK, True, EVEN_Q, EVEN_K, EVEN_D, PRECISION, False, True,
                p_of_each is not None, AS_OPERANDS, 1, BLOCK_Q, BLOCK_K, BLOCK_D, i,
            )  # fmt: skip
        for i in range(tl.program_id(0), of_keys, tl.num_programs(0)):
            grad_kv_kernel(
                p_q, p_k, p_v, p_mask, p_bias, p_stats, p_grad, p_delta, p_grad_k, p_grad_v,
                stride_qb, stride_qs, stride_qn, stride_qh, stride_qd,
                stride_kb, stride_ks, stride_kn, stride_kh, stride_kd,
                stride_vb, stride_vs, stride_vn, stride_vh, stride_vd,
                stride_gb, stride_gs, stride_gn, stride_gh, stride_gd,
                stride_mb, stride_ms, stride_mk, stride_bb, stride_bh, stride_bq, stride_bk,
                scale, rows, rows_per_bias, stride_inverse, queries, keys, heads, width,
                STEP, HAS_MASK, True, EVEN_Q, EVEN_K, EVEN_D, PRECISION, False, True, True,
                AS_OPERANDS, False, 1, BLOCK_Q, BLOCK_K, BLOCK_D, i,
            )  # fmt: skip
        if p_shared is not None:
            for i in range(tl.program_id(0), of_bias, tl.num_programs(0)):
                grad_bias_kernel(
                    p_q, p_k, p_v, p_mask, p_bias, p_stats, p_grad, p_delta, p_shared,
                    stride_qb, stride_qs, stride_qn, stride_qh, stride_qd,
                    stride_kb, stride_ks, stride_kn, stride_kh, stride_kd,
                    stride_vb, stride_vs, stride_vn, stride_vh, stride_vd,
                    stride_gb, stride_gs, stride_gn, stride_gh, stride_gd,
                    stride_mb, stride_ms, stride_mk, stride_bb, stride_bh, stride_bq, stride_bk,
                    scale, rows, rows_per_bias, stride_inverse, queries, keys, heads, width,
                    biases, rows_per_bias,
                    STEP, HAS_MASK, True, EVEN_Q, EVEN_K, EVEN_D, PRECISION, False, WRAP,
                    BLOCK_Q, BLOCK_K, BLOCK_D, i,
                )  # fmt: skip
