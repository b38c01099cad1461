"""Native Sparse Attention as it is most often written: plain PyTorch, every branch a dense mask over all keys.

Three branches look at the same queries (https://arxiv.org/abs/2502.11089): *compressed* attention to one key per block of
tokens, *selected* attention to the blocks that the compressed probabilities find important, and a *sliding window*. Sigmoid
gates per head and token add them up.

Nothing here knows about fsa_compile. Run it to see eager against ``torch.compile(model, backend="fsa")``::

    python examples/dense_nsa.py                  # small
    python examples/dense_nsa.py --length 8192    # eager peaks at 10 GB here
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn


class Compression(nn.Module):
    """One key (or value) per block of tokens: a small MLP of the flattened block, after a position embedding.

    Args:
        dim_head: Head dimension.
        block: Tokens per compressed key.
        stride: Tokens between the starts of neighbouring blocks; blocks overlap where it is less than `block`.
    """

    def __init__(self, dim_head: int, block: int, stride: int) -> None:
        super().__init__()
        self.block, self.stride = block, stride
        self.position = nn.Parameter(torch.randn(block, dim_head) * 0.02)
        self.mlp = nn.Sequential(
            nn.Linear(block * dim_head, dim_head), nn.GELU(), nn.Linear(dim_head, dim_head, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, n, d) to (b, h, c, d) with c = (n - block) // stride + 1."""
        blocks = x.unfold(2, self.block, self.stride).transpose(-1, -2)
        return self.mlp((blocks + self.position).flatten(-2))


class DenseNSA(nn.Module):
    """Causal native sparse attention with grouped queries.

    Args:
        dim: Width of the model.
        heads: Query heads; query head h reads key/value head h // (heads // kv_heads).
        kv_heads: Key/value heads.
        dim_head: Head dimension.
        block: Tokens per selection block.
        topk: Selected blocks per query and key/value head, the first and the local two included.
        window: Keys that the sliding window sees, the query's own included.
        compress_block: Tokens per compressed key.
        compress_stride: Tokens between the starts of neighbouring compressed keys.
    """

    def __init__(
        self,
        dim: int = 256,
        heads: int = 8,
        kv_heads: int = 2,
        dim_head: int = 64,
        block: int = 64,
        topk: int = 16,
        window: int = 512,
        compress_block: int = 32,
        compress_stride: int = 16,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.group = heads // kv_heads
        self.block, self.topk, self.window = block, topk, window
        self.compress_block, self.compress_stride = compress_block, compress_stride
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, kv_heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, kv_heads * dim_head, bias=False)
        self.to_gates = nn.Linear(dim, 3 * heads)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.compress_k = Compression(dim_head, compress_block, compress_stride)
        self.compress_v = Compression(dim_head, compress_block, compress_stride)

    def compressed_attention(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to compressed keys whose last token is not in the future.

        Early queries see none of them: their row of -inf makes the softmax NaN, and `nan_to_num` makes that 0. The gradient
        stays finite, because `masked_fill` passes none to masked logits.

        Returns:
            The output (b, heads, n, d) and the probabilities (b, heads, n, c).
        """
        n = q.shape[2]
        k_cmp = self.compress_k(k).repeat_interleave(self.group, dim=1)
        v_cmp = self.compress_v(v).repeat_interleave(self.group, dim=1)
        i = torch.arange(n, device=q.device)[:, None]
        j = torch.arange(k_cmp.shape[2], device=q.device)[None, :]
        visible = i >= j * self.compress_stride + self.compress_block - 1
        scores = q @ k_cmp.transpose(-1, -2) * self.scale
        scores = scores.masked_fill(~visible, float("-inf"))
        probs = torch.nan_to_num(scores.softmax(dim=-1))
        return probs @ v_cmp, probs

    def choose_blocks(self, probs: Tensor) -> Tensor:
        """Blocks with the largest compressed probability, summed over the group: (b, kv_heads, n, topk).

        A compressed key counts for a block in proportion to the tokens they share. The first block and the local two
        always win; blocks of the future never do while others are left.
        """
        n, c = probs.shape[2:]
        blocks = (n + self.block - 1) // self.block
        key_start = torch.arange(c, device=probs.device)[:, None] * self.compress_stride
        block_start = torch.arange(blocks, device=probs.device)[None, :] * self.block
        first = torch.maximum(key_start, block_start)
        last = torch.minimum(key_start + self.compress_block, block_start + self.block)
        overlap = (last - first).clamp(min=0).to(probs.dtype) / self.compress_stride

        importance = probs.unflatten(1, (self.kv_heads, self.group)).sum(dim=2) @ overlap
        own = torch.arange(n, device=probs.device)[:, None] // self.block
        block = torch.arange(blocks, device=probs.device)[None, :]
        importance = importance.masked_fill((block == 0) | (block == own) | (block == own - 1), float("inf"))
        importance = importance.masked_fill(block > own, float("-inf"))
        return importance.topk(min(self.topk, blocks), dim=-1).indices

    def selected_attention(self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
        """Attention to the tokens of the listed blocks that are not in the future: (b, heads, n, d)."""
        b, _, n, _ = q.shape
        blocks = (n + self.block - 1) // self.block
        mask = torch.zeros(b, self.kv_heads, n, blocks, dtype=torch.bool, device=q.device)
        mask = mask.scatter(-1, indices, True)
        mask = mask.repeat_interleave(self.block, dim=-1)[..., :n]
        position = torch.arange(n, device=q.device)
        mask = mask & (position[None, :] <= position[:, None])
        mask = mask.repeat_interleave(self.group, dim=1)
        k = k.repeat_interleave(self.group, dim=1)
        v = v.repeat_interleave(self.group, dim=1)
        scores = q @ k.transpose(-1, -2) * self.scale
        return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v

    def window_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention to the last `window` tokens, the own one included: (b, heads, n, d)."""
        position = torch.arange(q.shape[2], device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < self.window)
        k = k.repeat_interleave(self.group, dim=1)
        v = v.repeat_interleave(self.group, dim=1)
        scores = q @ k.transpose(-1, -2) * self.scale
        return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) to (b, n, dim), for any n >= compress_block."""
        q = self.to_q(x).unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2)
        k = self.to_k(x).unflatten(-1, (self.kv_heads, self.dim_head)).transpose(1, 2)
        v = self.to_v(x).unflatten(-1, (self.kv_heads, self.dim_head)).transpose(1, 2)
        compressed, probs = self.compressed_attention(q, k, v)
        selected = self.selected_attention(q, k, v, self.choose_blocks(probs))
        window = self.window_attention(q, k, v)
        gates = self.to_gates(x).sigmoid().unflatten(-1, (3, self.heads)).transpose(1, 3).unsqueeze(-1)
        out = gates[:, :, 0] * compressed + gates[:, :, 1] * selected + gates[:, :, 2] * window
        return self.to_out(out.transpose(1, 2).flatten(2))


def measure(model: nn.Module, x: Tensor, repeats: int) -> tuple[list[Tensor], float]:
    """Output and all gradients, and the shortest of `repeats` forward + backward passes in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = model(x)
        gradients = torch.autograd.grad(out.square().mean(), [x, *model.parameters()])
        seconds.append(time.perf_counter() - start)
    return [out.detach(), *gradients], min(seconds)


def main() -> None:
    """Eager against compiled: time, largest difference, and the report."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes; the best counts")
    parser.add_argument("--inner", default="inductor", help="what compiles the rest of the model")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = DenseNSA()
    x = torch.randn(arguments.batch, arguments.length, 256, requires_grad=True)
    eager, eager_seconds = measure(model, x, arguments.repeats)
    options = {"inner": arguments.inner, "report": "summary"}  # prints the report while compiling
    compiled = torch.compile(model, backend="fsa", fullgraph=True, options=options)
    measure(compiled, x, 1)  # compiles
    fast, fast_seconds = measure(compiled, x, arguments.repeats)

    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(fast, eager, strict=True))
    print(f"eager     {eager_seconds * 1e3:8.1f} ms forward + backward")
    print(f"compiled  {fast_seconds * 1e3:8.1f} ms forward + backward, {eager_seconds / fast_seconds:.1f} times faster")
    print(f"largest difference of the output and the {len(eager) - 1} gradients, norm-wise: {difference:.1e}")


if __name__ == "__main__":
    main()
