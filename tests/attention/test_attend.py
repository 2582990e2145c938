"""attend: every way to the result equals the definition, and the definition equals a sum written out."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from regard.attention import attend as module
from regard.attention.attend import Attended, attend, attend_reference
from regard.attention.masks import Mask, block, causal, document, prefix, sinks_and_window, window
from regard.attention.recorder import record


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int = 4, **options):
    shapes = [(batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)]
    return tuple(normal(*shape, seed=seed, **options) for seed, shape in enumerate(shapes))


@st.composite
def calls(draw):
    """Small tensors of any shape, with any mask and bias that fit them; rows and keys may be empty."""
    batch, kv_heads, group = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    keys = draw(st.integers(0, 6))
    queries = draw(st.integers(0, keys))
    full = (batch, kv_heads * group, queries, keys)

    def shape() -> tuple[int, ...]:
        broadcast = [draw(st.sampled_from([1, size])) for size in full]
        return tuple(broadcast[draw(st.integers(0, 3)) :])

    seed = draw(st.integers(0, 99))
    mask = draw(st.sampled_from(["none", "tensor", "causal", "window", "nothing", "document"]))
    mask = {
        "none": lambda: None,
        "tensor": lambda: normal(*shape(), seed=seed) > 0,
        "causal": causal,
        "window": lambda: window(2),
        "nothing": lambda: ~prefix(9),
        "document": lambda: document(torch.arange(batch * keys).view(batch, keys) % 3),
    }[mask]()
    bias = normal(*shape(), seed=seed + 1) if draw(st.booleans()) else None
    scale = draw(st.sampled_from([None, 0.3]))
    return qkv(batch, full[1], kv_heads, queries, keys), dict(mask=mask, bias=bias, scale=scale)


@settings(max_examples=300)
@given(call=calls(), need_weights=st.booleans(), need_lse=st.booleans())
def test_every_way_equals_the_definition(call, need_weights, need_lse):
    tensors, options = call
    expected = attend_reference(*tensors, **options)
    result = attend(*tensors, **options, need_weights=need_weights, need_lse=need_lse)
    if not need_weights and not need_lse:
        result = Attended(result)
    torch.testing.assert_close(result.out, expected.out)
    assert (result.weights is not None, result.lse is not None) == (need_weights, need_lse)
    if need_weights:
        torch.testing.assert_close(result.weights, expected.weights)
    if need_lse:
        torch.testing.assert_close(result.lse, expected.lse)


@given(call=calls())
def test_the_definition_equals_the_sum_written_out(call):
    (q, k, v), options = call
    out, weights, lse = attend_reference(q, k, v, **options)
    batch, heads, queries, keys = weights.shape
    mask, bias = options["mask"], options["bias"]
    mask = mask.tensor(queries, keys, batch=batch) if isinstance(mask, Mask) else mask
    allowed = torch.ones(weights.shape, dtype=torch.bool) & (mask if mask is not None else True)
    bias = torch.zeros(weights.shape) + (bias if bias is not None else 0)
    scale = options["scale"] or 1 / math.sqrt(q.shape[-1])
    for b, h, i in torch.cartesian_prod(*[torch.arange(n) for n in (batch, heads, queries)]).tolist():
        group = h * k.shape[1] // heads
        seen = [j for j in range(keys) if allowed[b, h, i, j]]
        powers = [math.exp(q[b, h, i].dot(k[b, group, j]).item() * scale + bias[b, h, i, j].item()) for j in seen]
        total = sum(powers)
        mean = sum((p / total * v[b, group, j] for p, j in zip(powers, seen, strict=True)), torch.zeros(4))
        torch.testing.assert_close(out[b, h, i], mean)
        assert lse[b, h, i].item() == pytest.approx(math.log(total) if seen else -math.inf, abs=1e-5)
        assert weights[b, h, i].sum().item() == pytest.approx(1 if seen else 0, abs=1e-5)


def test_worked_values():
    q, k = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 3, 1)
    v = torch.tensor([3.0, 6.0, 12.0]).view(1, 1, 3, 1)
    assert attend(q, k, v).flatten().tolist() == pytest.approx([7, 7])  # equal scores: the mean
    assert attend(q, k, v, mask=causal()).flatten().tolist() == pytest.approx([4.5, 7])  # the last two queries
    nothing_and_last = torch.tensor([[False, False, False], [False, False, True]])
    out, weights, lse = attend(q, k, v, mask=nothing_and_last, need_weights=True, need_lse=True)
    assert out.flatten().tolist() == [0, 12]
    assert weights.flatten().tolist() == [0, 0, 0, 0, 0, 1]
    assert lse.flatten().tolist() == [-math.inf, 0]
    doubled = torch.tensor([0.0, 0.0, math.log(2)])  # the last key counts twice
    assert attend(q, k, v, bias=doubled).flatten().tolist() == pytest.approx([33 / 4] * 2)


LONG = 640
sparse = {
    "window": window(100),
    "sinks and window": sinks_and_window(10, 100),
    "documents per row": document(torch.arange(2 * LONG).view(2, LONG) // 90),
    "blocks": block(torch.eye(5, dtype=torch.bool).roll(1, 0), 128),
    "per head": window(50) & Mask(lambda batch, head, query, key: key % (head + 1) == 0),
    "some rows see nothing": window(100) & ~Mask(lambda batch, head, query, key: query // 128 == 2),
    "nothing": ~prefix(LONG),
}


@pytest.mark.parametrize("name", sparse)
@pytest.mark.parametrize("queries", [LONG, 201])
@pytest.mark.parametrize(
    "options", [{}, {"bias": "yes"}, {"need_lse": True}, {"bias": "yes", "need_lse": True}], ids=str
)
def test_only_visible_blocks_are_computed_and_the_result_is_the_same(name, queries, options, monkeypatch):
    mask, tensors = sparse[name], qkv(2, 4, 2, queries, LONG)
    options = dict(options)
    if "bias" in options:
        options["bias"] = normal(4, 1, LONG, seed=7)
    computed = []
    for way in ("_fused", "attend_reference", "partial_attention"):
        original = getattr(module, way)

        def counted(q, k, v, *args, original=original, **kwargs):
            computed.append(q.shape[2] * k.shape[2])
            return original(q, k, v, *args, **kwargs)

        monkeypatch.setattr(module, way, counted)
    result = attend(*tensors, mask=mask, **options)
    if not ("bias" in options and options.get("need_lse")):
        pairs = mask.block_table(queries, LONG, batch=2, heads=4).some.flatten(0, 1).any(0).sum() * 128 * 128
        assert 0 <= sum(computed) <= pairs <= 0.75 * 6 * 5 * 128 * 128
    expected = attend_reference(*tensors, mask=mask, bias=options.get("bias"))
    torch.testing.assert_close(result.out if options.get("need_lse") else result, expected.out)
    if options.get("need_lse"):
        torch.testing.assert_close(result.lse, expected.lse)


def gradients(function, tensors, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    if options["bias"] is not None:
        options["bias"] = options["bias"].clone().requires_grad_()
    result = function(*leaves, **options)
    leaves += [options["bias"]] if options["bias"] is not None else []
    result = result if isinstance(result, torch.Tensor) else result.out
    return torch.autograd.grad(result.square().sum() + result.sum(), leaves)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ["none", "causal", "tensor", "window", "some rows see nothing", "nothing"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("queries", [1, 3, 300])
def test_gradients_are_finite_and_those_of_the_definition(kv_heads, name, biased, queries):
    keys = LONG if queries == 300 else 5
    tensors = qkv(2, 4, kv_heads, queries, keys, dtype=torch.float64)
    mask = sparse.get(name)
    if name == "causal":
        mask = causal()
    if name == "tensor":
        mask = normal(2, 1, queries, keys, seed=5) > 0.5
    bias = normal(4, queries, keys, seed=6, dtype=torch.float64) if biased else None
    ours = gradients(attend, tensors, mask=mask, bias=bias)
    for mine, expected in zip(ours, gradients(attend_reference, tensors, mask=mask, bias=bias), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, expected)


def test_no_keys_give_zeros_with_a_gradient():
    q, k, v = (tensor.requires_grad_() for tensor in qkv(2, 4, 2, 3, 0))
    out, lse = attend(q, k, v, need_lse=True)[::2]
    assert not out.any()
    assert (lse == -math.inf).all()
    attend(q, k, v).sum().backward()
    assert not q.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "mask", [None, causal(), window(100), sparse["some rows see nothing"]], ids=["none", "causal", "window", "nothing"]
)
@pytest.mark.parametrize("options", [{}, {"need_lse": True}, {"need_weights": True}, {"bias": True}], ids=str)
def test_half_precision(dtype, mask, options):
    tensors = qkv(2, 4, 2, LONG, LONG, dim=8, dtype=dtype)
    options = dict(options, bias=normal(LONG, seed=3)) if "bias" in options else options
    result = attend(*tensors, mask=mask, **options)
    exact = attend_reference(*[tensor.double() for tensor in tensors], mask=mask, bias=options.get("bias"))
    out = result if isinstance(result, torch.Tensor) else result.out
    assert out.dtype == dtype
    tolerance = dict(atol=0.02, rtol=0.02, check_dtype=False)
    torch.testing.assert_close(out, exact.out, **tolerance)
    if "need_lse" in options:
        assert result.lse.dtype == torch.float32
        torch.testing.assert_close(result.lse, exact.lse, **tolerance)


def test_what_comes_back():
    tensors = qkv(1, 2, 2, 3, 3)
    assert isinstance(attend(*tensors), torch.Tensor)
    assert attend(*tensors, need_weights=True)._fields == ("out", "weights", "lse")
    assert attend(*tensors, need_weights=True).lse is None
    assert attend(*tensors, need_lse=True).weights is None
    with record() as recording:
        assert isinstance(attend(*tensors), torch.Tensor)
        assert attend(*tensors, need_lse=True).weights is None
    assert len(recording.calls["attend"]) == 2


ones = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        ([(2, 3, 4), (2, 3, 4), (2, 3, 4)], {}, ValueError, "q, k and v must have 4 dimensions, got 3, 3 and 3"),
        (
            [(1, 3, 2, 4), (1, 2, 3, 4), (1, 2, 3, 4)],
            {},
            ValueError,
            "multiple of kv_heads, got 3 heads and 2 kv_heads",
        ),
        ([(1, 2, 2, 4), (1, 2, 3, 8), (1, 2, 3, 8)], {}, ValueError, "must agree in batch, kv_heads, keys and dim"),
        ([(1, 2, 2, 4), (1, 2, 3, 4), (1, 2, 4, 4)], {}, ValueError, "must agree in batch, kv_heads, keys and dim"),
        (None, {"mask": ones.T}, ValueError, r"mask must broadcast to .* = \(1, 2, 2, 3\), got \(3, 2\)"),
        (None, {"mask": ones.expand(1, 1, 1, 2, 3)}, ValueError, r"mask must broadcast to .*, got \(1, 1, 1, 2, 3\)"),
        (None, {"mask": ones.float()}, TypeError, r"mask must be boolean \(True = may attend\), got torch\.float32"),
        (None, {"bias": ones.T.float()}, ValueError, r"bias must broadcast to .* = \(1, 2, 2, 3\), got \(3, 2\)"),
        (None, {"bias": ones}, TypeError, r"bias must be floating-point, got torch\.bool"),
        (None, {"mask": document(torch.zeros(2).long())}, ValueError, "the mask is for 2 query positions, got 3"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(shapes, options, error, message):
    tensors = [torch.zeros(shape) for shape in shapes or [(1, 2, 2, 4), (1, 2, 3, 4), (1, 2, 3, 4)]]
    with pytest.raises(error, match=message):
        unchecked(attend)(*tensors, **options)


def unchecked(function):
    """Without the annotation check of the tests, which would refuse the same input before the function does."""
    return getattr(function, "__wrapped__", function)


def test_flex_attention_gives_the_same_on_the_devices_that_use_it(monkeypatch):
    """Traced as for a GPU, but not compiled, which takes half a minute: test_masks holds the blocks it would visit."""
    traced = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend="eager")
    monkeypatch.setattr(module, "_flex_devices", {"cpu"})
    monkeypatch.setattr(module, "_compiled_flex", lambda: traced)
    tensors, mask = qkv(2, 4, 2, LONG, LONG, dim=16), sparse["documents per row"] & causal()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a fall back would warn
        out = attend(*tensors, mask=mask, scale=0.3)
    assert module._flex_devices == {"cpu"}
    torch.testing.assert_close(out, attend_reference(*tensors, mask=mask, scale=0.3).out)


def test_without_a_compiler_the_fused_kernel_serves_after_one_warning(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler found\nlong story")

    monkeypatch.setattr(module, "_flex_devices", {"cpu"})
    monkeypatch.setattr(module, "_compiled_flex", lambda: broken)
    tensors, mask = qkv(1, 2, 2, LONG, LONG), window(100)
    expected = attend_reference(*tensors, mask=mask).out
    with pytest.warns(RuntimeWarning, match="using PyTorch's fused kernel: no C\\+\\+ compiler found$"):
        torch.testing.assert_close(attend(*tensors, mask=mask), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(attend(*tensors, mask=mask), expected)
