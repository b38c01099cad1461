"""Attention over a band of keys as a dense mask in float64, for the kernel tests on a CPU and on a GPU."""

from __future__ import annotations

import torch

from fsa_compile.kernels.reference import (
    compressed_visibility,
    masked_attention,
    query_positions,
    sliding_window_visibility,
)


def visible(rule, n, m, device):
    """(b or 1, 1, n, m) boolean: which keys each query sees."""
    positions = query_positions(n, rule.q_offset, rule.q_offsets, device)
    if rule.window is not None:
        return sliding_window_visibility(positions, m, rule.window)
    return compressed_visibility(positions, m, rule.stride, rule.last, rule.prefix)


def results(q, k, v, dout, dlse, scale, rule):
    """out, lse, dq, dk, dv in float64; dlse None: lse is not used."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = masked_attention(*leaves, visible(rule, q.shape[2], k.shape[2], q.device), scale)
    loss = (out * dout.double()).sum()
    if dlse is not None:
        loss = loss + (lse * dlse.double()).masked_fill(lse == -torch.inf, 0.0).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)
