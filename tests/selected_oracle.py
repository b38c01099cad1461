"""Selected attention written as a dense mask in float64, and the inputs that the kernel tests share."""

from __future__ import annotations

import torch


def visible(indices, n_keys, block_size, rule, offsets):
    """(b, hi, n, m) boolean: which keys each query sees. `offsets` is a (b,) tensor."""
    b, hi, n, t = indices.shape
    blocks = -(-n_keys // block_size)
    named = torch.where((indices >= 0) & (indices < blocks), indices, blocks).long()
    listed = torch.zeros(b, hi, n, blocks + 1, dtype=torch.bool, device=indices.device)
    listed.scatter_(3, named, torch.ones_like(named, dtype=torch.bool))
    key = torch.arange(n_keys, device=indices.device)
    seen = listed[..., key // block_size]
    position = (torch.arange(n, device=indices.device) + offsets.to(indices.device)[:, None])[:, None, :, None]
    if rule == "causal":
        seen = seen & (key <= position)
    elif rule == "diagonal":
        own = key // block_size == torch.div(position, block_size, rounding_mode="floor")
        seen = seen & (~own | (key <= position))
    return seen


def attend(q, k, v, indices, block_size, scale, rule, offsets):
    """out (b, hq, n, dv), lse (b, hq, n) in float64, differentiable; a query without keys gets 0 and -inf."""
    q, k, v = (x.double() for x in (q, k, v))
    hq = q.shape[1]
    k, v = (x.repeat_interleave(hq // x.shape[1], 1) for x in (k, v))
    seen = visible(indices, k.shape[2], block_size, rule, offsets).repeat_interleave(hq // indices.shape[1], 1)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    some = seen.any(-1, keepdim=True)
    logits = logits.masked_fill(~seen & some, float("-inf")).masked_fill(~some, 0.0)
    out = torch.where(some, logits.softmax(-1) @ v, 0.0)
    return out, torch.where(some[..., 0], logits.logsumexp(-1), float("-inf"))


def gradients(q, k, v, indices, block_size, scale, rule, offsets, dout, dlse):
    """dq, dk, dv in float64 for gradients of out and of lse (None: lse is not used)."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, indices, block_size, scale, rule, offsets)
    loss = (out * dout.double()).sum()
    if dlse is not None:
        loss = loss + (lse * dlse.double()).masked_fill(lse == float("-inf"), 0.0).sum()
    return torch.autograd.grad(loss, leaves)


def error(x, y):
    """||x - y|| / ||y||, infinite if x holds a NaN."""
    x, y = x.double().cpu(), y.double().cpu()
    if x.isnan().any():
        return float("inf")
    return ((x - y).norm() / y.norm().clamp_min(1e-30)).item()


def random_lists(generator, b, hi, n, t, blocks, dtype=torch.int32, low=-2, high=2):
    """(b, hi, n, t) block lists with everything a list may hold: holes, repetitions and blocks that do not exist."""
    return torch.randint(low, blocks + high, (b, hi, n, t), generator=generator).to(dtype)
