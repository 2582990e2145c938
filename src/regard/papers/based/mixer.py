"""The three mixers of Based: a gated short convolution, Taylor linear attention, and softmax in a small window."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from regard.attention.attend import attend
from regard.attention.linear import LinearState, Taylor, linear_attention
from regard.attention.positions import rotary_half
from regard.blocks.convolution import CausalConvolution
from regard.blocks.sequence_mixer import SequenceMixer

__all__ = [
    "BaseConv",
    "ConvolutionState",
    "SlidingWindowAttention",
    "TaylorLinearAttention",
    "WindowState",
    "windowed_attention",
]


class ConvolutionState(NamedTuple):
    """The inputs that the next outputs of a convolution still see."""

    inputs: Tensor
    """(batch, kernel - 1, channels), zeros before the first token."""


class BaseConv(SequenceMixer):
    """A causal convolution over a few tokens, gated by a projection of the token: cheap, and exact about what is near.

    Source: section 3.3, and the released code, which widens the channels twofold and applies SiLU to the convolution.
    """

    def __init__(self, dim: int, *, kernel: int = 3, expansion: int = 2, conv_bias: bool = False) -> None:
        super().__init__()
        inner = expansion * dim
        self.in_proj = nn.Linear(dim, 2 * inner)
        self.conv = CausalConvolution(inner, kernel, bias=conv_bias)
        self.out_proj = nn.Linear(inner, dim)

    def initial(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ConvolutionState:
        """Zeros before the first token."""
        return ConvolutionState(self.conv.initial(batch, device, dtype))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], state: ConvolutionState | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], ConvolutionState]:
        """The mixed tokens, and the state after the last of them."""
        convolved, gate = self.in_proj(x).chunk(2, dim=-1)
        convolved, inputs = self.conv(convolved, None if state is None else state.inputs)
        return self.out_proj(F.silu(convolved) * gate), ConvolutionState(inputs)


class TaylorLinearAttention(SequenceMixer):
    """Linear attention whose weights are the second-order Taylor polynomial of softmax's: a memory of fixed size.

    The state has `num_heads * (1 + feature_dim + feature_dim^2) * (head_dim + 1)` numbers, however long the text:
    `feature_dim` is the dial between recall and memory. Positions are left to the convolutions around it.

    Source: section 3.1; no rotary positions and no gate, as in the released code.
    """

    def __init__(
        self, dim: int, *, num_heads: int = 16, feature_dim: int = 16, chunk: int = 128, eps: float = 1e-12
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.dim, self.num_heads, self.chunk, self.eps = dim, num_heads, chunk, eps
        self.feature_map = Taylor(feature_dim)
        self.proj_q = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.proj_k = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.proj_v = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def initial(self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> LinearState:
        """An empty memory; its sums are in float32, or in float64 where `dtype` is."""
        weight = self.out_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        features = self.feature_map.size(self.feature_map.dim)
        kv = torch.zeros(batch, self.num_heads, features, self.dim // self.num_heads, device=device, dtype=sums)
        return LinearState(kv, kv[..., 0].clone())

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], state: LinearState | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], LinearState]:
        """The mixed tokens, and the state after the last of them."""
        q, k, v = (
            rearrange(project(x), "batch tokens (heads dim) -> batch heads tokens dim", heads=self.num_heads)
            for project in (self.proj_q, self.proj_k, self.proj_v)
        )
        out, state = linear_attention(
            q, k, v, feature_map=self.feature_map, eps=self.eps, state=state, chunk=self.chunk
        )
        return self.out_proj(rearrange(out, "batch heads tokens dim -> batch tokens (heads dim)")), state


class WindowState(NamedTuple):
    """The last keys and values, oldest first, and how many tokens there have been."""

    k: Tensor
    """(batch, heads, window, head_dim), already rotated to their absolute positions."""
    v: Tensor
    """(batch, heads, window, head_dim)."""
    seen: Tensor
    """(batch,), int64."""


class SlidingWindowAttention(SequenceMixer):
    """Softmax attention to the token itself and the `window` tokens before it, with rotary positions.

    `rotary_base=None` leaves positions out. Time per token grows with the window only: queries are taken in blocks,
    each of which sees its own keys and the window before it.

    Source: section 3.2; the released code gives half of its `window_size` to the kernel, so 128 there is 64 here.
    """

    def __init__(self, dim: int, *, num_heads: int = 16, window: int = 64, rotary_base: float | None = 10000.0) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if rotary_base is not None and dim // num_heads % 2:
            raise ValueError(f"rotary positions need an even dim per head, got {dim // num_heads}")
        self.dim, self.num_heads, self.window, self.rotary_base = dim, num_heads, window, rotary_base
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def initial(self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> WindowState:
        """An empty window at position 0."""
        weight = self.out_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        k = torch.zeros(batch, self.num_heads, self.window, self.dim // self.num_heads, device=device, dtype=dtype)
        return WindowState(k, torch.zeros_like(k), torch.zeros(batch, device=device, dtype=torch.int64))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], state: WindowState | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], WindowState]:
        """The mixed tokens, and the state after the last of them."""
        batch, tokens, _ = x.shape
        q, k, v = rearrange(
            self.qkv_proj(x),
            "batch tokens (three heads dim) -> three batch heads tokens dim",
            three=3,
            heads=self.num_heads,
        )
        seen = torch.zeros(1, device=x.device, dtype=torch.int64) if state is None else state.seen
        if self.rotary_base is not None:
            positions = seen[:, None] + torch.arange(tokens, device=x.device)
            positions = positions.expand(batch, tokens)
            q, k = rotary_half(q, positions, self.rotary_base), rotary_half(k, positions, self.rotary_base)
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], dim=2), torch.cat([state.v.to(v.dtype), v], dim=2)
        out = windowed_attention(q, k, v, self.window, filled=seen.clamp(max=self.window))
        after = WindowState(_last(k, self.window), _last(v, self.window), seen.expand(batch) + tokens)
        return self.out_proj(rearrange(out, "batch heads tokens dim -> batch tokens (heads dim)")), after


def windowed_attention(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys dim"],
    window: int,
    filled: Int64[Tensor, "#batch"],
) -> Float[Tensor, "batch heads tokens dim"]:
    """Softmax attention of each token to its own key and the `window` before it.

    Keys in front of the first query's own count backwards from it; only the last `filled` of them are real. Exact:
    long sequences are cut into blocks of queries, and each block meets the keys that it can see.
    """
    heads, tokens = q.shape[1:3]
    if tokens == 0:
        return q
    blocks = -(-tokens // max(window, 128))
    block = -(-tokens // blocks)
    if blocks > 1:
        missing, behind = window + tokens - k.shape[2], blocks * block - tokens
        q = rearrange(
            F.pad(q, (0, 0, 0, behind)), "batch heads (blocks block) dim -> batch (heads blocks) block dim", block=block
        )
        k, v = (
            rearrange(
                F.pad(x, (0, 0, missing, behind)).unfold(2, block + window, block),
                "batch heads blocks dim keys -> batch (heads blocks) keys dim",
            )
            for x in (k, v)
        )
    before = k.shape[2] - block  # keys in front of the block's first query
    query, key = torch.arange(block, device=q.device)[:, None], torch.arange(-before, block, device=q.device)
    first = torch.arange(blocks, device=q.device)[:, None, None] * block
    visible = (key <= query) & (key >= query - window) & (first + key >= -filled[:, None, None, None])
    out = attend(q, k, v, mask=visible if blocks == 1 else visible.repeat(1, heads, 1, 1))
    return rearrange(out, "batch (heads blocks) block dim -> batch heads (blocks block) dim", heads=heads)[
        :, :, :tokens
    ]


def _last(x: Tensor, window: int) -> Tensor:
    """The last keys or values, zeros in front where there are too few. A copy: a slice would keep them all alive."""
    missing = max(0, window - x.shape[2])
    return F.pad(x, (0, 0, missing, 0)) if missing else x[:, :, x.shape[2] - window :].clone()


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"dim must be a positive multiple of num_heads, got dim {dim} and num_heads {num_heads}")
