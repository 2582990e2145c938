"""Keys and values as small integers: how far off they are, what they take, and that every policy still works."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.llm import H2O, Full, Quantised, SnapKV, Streaming, use
from regard.llm.cache import GrowingStore
from regard.llm.codec import AS_IS, Integers
from regard.llm.policies import POLICY_EXAMPLES

POLICIES = pytest.mark.parametrize("name", POLICY_EXAMPLES)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([8, 4]), st.integers(0, 3), st.sampled_from([2, 8, 64]), st.integers(0, 99))
def test_every_number_is_off_by_half_a_step_at_most(bits, tokens, dim, seed):
    vectors = 10 * torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(seed))
    codec = Integers(bits)
    rows = codec.encode(vectors)
    assert rows.dtype == torch.uint8 and rows.shape == (2, tokens, codec.row_bytes(dim, 4))
    back = codec.decode(rows, torch.float32)
    assert back.shape == vectors.shape
    if tokens:
        span = vectors.amax(-1) - vectors.amin(-1)
        rounded = 2e-3 * vectors.abs().amax(-1) + 2e-3 * span if bits == 4 else 1e-5 * span + 1e-5  # its fp16 numbers
        assert ((back - vectors).abs() <= (0.5 * span / (2**bits - 1) + 2 * rounded)[..., None]).all()
        assert bits == 8 or (back - vectors).abs().max() > 0 or dim == 2


def test_a_row_does_not_depend_on_its_neighbours():
    vectors = torch.randn(5, 8)
    rows = Integers(8).encode(vectors)
    assert torch.equal(Integers(8).encode(vectors[3:4]), rows[3:4])
    assert torch.equal(Integers(8).decode(rows[[4, 0]], torch.float32), Integers(8).decode(rows, torch.float32)[[4, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_store_gives_back_the_dtype_it_was_given(dtype):
    store = GrowingStore()
    store.codec = Integers(8)
    key = torch.randn(1, 2, 5, 8).to(dtype)
    keys, values = store.append(key, -key)
    assert keys.dtype == values.dtype == dtype
    torch.testing.assert_close(keys, key, rtol=0, atol=0.05)
    assert store.bytes_held == 2 * 2 * 5 * 16
    chosen, _ = store.chosen(torch.tensor([[[4, 0], [1, 1]]]))
    assert torch.equal(chosen[0, 0, 0], keys[0, 0, 4]) and torch.equal(chosen[0, 1, 1], keys[0, 1, 1])


@POLICIES
@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_held_keep_the_promise_under_every_policy(llama, tokens, name, bits):
    policy = Quantised(POLICY_EXAMPLES[name](llama.config), bits)
    plain, ids = policy.policy, tokens(2, 30)
    held = []
    with use(llama, policy):
        cache = policy.cache(llama)
        for chunk in ids.split([3, 1, 11, *[1] * 8, 7], dim=1):
            assert llama(chunk, past_key_values=cache).logits.isfinite().all()
            seen = cache.get_seq_length()
            held.append(cache.bytes_held)
            assert 0 < held[-1] <= policy.promised_bytes(llama.config, 2, seen)
    dim = llama.config.head_dim
    stored = dim + 8 if bits == 8 else dim // 2 + 4
    assert held[0] == plain.promised_bytes(llama.config, 2, 3) * stored // (4 * dim)


@POLICIES
def test_eight_bits_change_little_and_something(llama, tokens, name):
    """One step after a prompt within every budget, where no policy has chosen anything yet."""
    plain = POLICY_EXAMPLES[name](llama.config)
    ids, logits = tokens(2, 6), {}
    for policy in (plain, Quantised(plain), Quantised(plain, bits=None)):
        with use(llama, policy):
            cache = policy.cache(llama)
            llama(ids[:, :5], past_key_values=cache)
            logits[policy] = llama(ids[:, 5:], past_key_values=cache).logits
    exact, rounded, as_it_comes = logits.values()
    assert torch.equal(exact, as_it_comes)
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("policy", [Full(), Streaming(2, 6), H2O(8, 3), SnapKV(8, 3)], ids=str)
def test_rows_beams_and_reset_work(llama, tokens, policy):
    policy, ids = Quantised(policy, bits=4), tokens(2)
    with use(llama, policy):
        first = llama.generate(ids, max_new_tokens=5, min_new_tokens=5, num_beams=3, do_sample=False)
        assert first.shape == (2, 25)
        cache = policy.cache(llama)
        once = llama(ids, past_key_values=cache).logits
        cache.reset()
        assert cache.bytes_held == 0
        assert torch.equal(llama(ids, past_key_values=cache).logits, once)


def test_its_file_holds_the_other_policy(tmp_path):
    policy = Quantised(H2O(budget=32), bits=4)
    policy.save(tmp_path)
    assert Quantised.load(tmp_path, kind=H2O) == policy
    with pytest.raises(ValueError, match="holds the policy 'H2O', expected 'Full'"):
        Quantised.load(tmp_path)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="bits must be one of 8, 4, got 3"):
        Quantised(Full(), bits=3)
    with pytest.raises(ValueError, match="cannot be quantised again"):
        Quantised(Quantised())
    with pytest.raises(ValueError, match="even number of channels, got 7"):
        Integers(4).encode(torch.randn(1, 7))


def test_without_bits_nothing_changes(llama):
    assert Quantised(bits=None).codec is AS_IS
    assert Quantised(Streaming(2, 6), bits=None).chunk_invariant
    assert not Quantised(Streaming(2, 6)).chunk_invariant
    assert Quantised(H2O()).with_budget(10, 100).policy == H2O(budget=10)
