"""What the baselines keep, token by token, against a plain recomputation that holds all keys and hides the dropped."""

import math

import pytest
import torch
from torch import Tensor

from regard.attention.masks import sinks_and_window
from regard.llm import H2O, Full, SnapKV, Streaming, attach, use
from regard.llm.visible import Visible

CLOSE = dict(rtol=1e-4, atol=1e-4)


def in_chunks(model, policy, ids: Tensor, chunks: list[int], mask: Tensor | None = None):
    cache, logits = policy.cache(model), []
    with use(model, policy):
        for chunk in ids.split(chunks, dim=1):
            seen = cache.get_seq_length() + chunk.shape[1]
            now = None if mask is None else mask[:, :seen]
            logits.append(model(chunk, past_key_values=cache, attention_mask=now).logits)
    return torch.cat(logits, dim=1), cache


class Plain:
    """Softmax attention over all keys, of which every KV head hides those that it has dropped."""

    def __init__(self) -> None:
        self.alive: dict[int, Tensor] = {}
        self.scores: dict[int, Tensor] = {}

    def __call__(self, module, query, key, value, visible: Visible, scale):
        layer, groups, keys = module.layer_idx, query.shape[1] // key.shape[1], key.shape[2]
        new = torch.ones(*key.shape[:2], query.shape[2], dtype=torch.bool)
        alive = torch.cat([self.alive[layer], new], dim=-1) if visible.first else new
        mask = visible.at(torch.arange(keys)) & alive.repeat_interleave(groups, 1)[:, :, None]
        scores = query @ key.repeat_interleave(groups, 1).mT * scale
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0)
        padding = visible.padding if visible.padding is not None else torch.ones(len(query), keys, dtype=torch.bool)
        self.alive[layer] = alive
        self.drop(layer, weights.unflatten(1, (-1, groups)).sum(2), padding)
        return weights @ value.repeat_interleave(groups, 1)

    def drop(self, layer: int, weights: Tensor, padding: Tensor) -> None:
        """Takes dropped tokens out of `self.alive`; weights are (batch, kv_heads, queries, keys)."""

    def run(self, model, ids: Tensor, chunks: list[int], mask: Tensor | None = None) -> Tensor:
        cache, logits, seen = None, [], 0
        with attach(model, self):
            for chunk in ids.split(chunks, dim=1):
                seen += chunk.shape[1]
                now = None if mask is None else mask[:, :seen]
                out = model(chunk, past_key_values=cache, attention_mask=now, use_cache=True)
                cache = out.past_key_values
                logits.append(out.logits)
        return torch.cat(logits, dim=1)


class PlainH2O(Plain):
    def __init__(self, policy: H2O) -> None:
        super().__init__()
        self.budget, self.recent = policy.budget, policy.recent or policy.budget // 2

    def drop(self, layer, weights, padding):
        alive, keys = self.alive[layer], weights.shape[-1]
        before = self.scores.get(layer, torch.zeros(*alive.shape[:2], 0))
        self.scores[layer] = torch.nn.functional.pad(before, (0, keys - before.shape[-1])) + weights.sum(2)
        for row, head in torch.cartesian_prod(*map(torch.arange, alive.shape[:2])).tolist():
            alive[row, head] &= padding[row]
            kept = alive[row, head].nonzero().flatten().tolist()
            old = sorted((p for p in kept if p < keys - self.recent), key=lambda p: self.scores[layer][row, head, p])
            for position in old[: max(len(kept) - self.budget, 0)]:
                alive[row, head, position] = False


class PlainSnapKV(Plain):
    def __init__(self, policy: SnapKV) -> None:
        super().__init__()
        self.policy = policy

    def drop(self, layer, weights, padding):
        alive, keys, reach = self.alive[layer], weights.shape[-1], self.policy.kernel // 2
        if weights.shape[2] == 1:
            return
        for row, head in torch.cartesian_prod(*map(torch.arange, alive.shape[:2])).tolist():
            alive[row, head] &= padding[row]
            kept = alive[row, head].nonzero().flatten().tolist()
            old = [p for p in kept if p < keys - self.policy.window]
            if len(kept) <= self.policy.budget:
                continue
            given = weights[row, head, -self.policy.window :].sum(0)
            votes = [given[p].item() for p in old]

            def pooled(i: int, votes: list[float] = votes) -> float:
                near = votes[max(i - reach, 0) : i + reach + 1]
                return max(near) if self.policy.pooling == "max" else sum(near) / self.policy.kernel

            ranking = sorted(range(len(old)), key=lambda i: (-pooled(i), i))
            for i in ranking[max(self.policy.budget - (len(kept) - len(old)), 0) :]:
                alive[row, head, old[i]] = False


def held_positions(cache, layer: int, row: int, head: int) -> set[int]:
    return set(cache.layers[layer].store.held("positions")[row, head].tolist())


def assert_same_contents(cache, plain: Plain, padding: Tensor | None = None) -> None:
    for layer, alive in plain.alive.items():
        for row, head in torch.cartesian_prod(*map(torch.arange, alive.shape[:2])).tolist():
            held = held_positions(cache, layer, row, head)
            pads = set() if padding is None else {p for p in held if not padding[row, p]}
            assert held - pads == set(alive[row, head].nonzero().flatten().tolist()), (layer, row, head)


@pytest.mark.parametrize(
    ("policy", "plain"),
    [
        (H2O(budget=10, recent=4), PlainH2O),
        (H2O(budget=7), PlainH2O),
        (H2O(budget=5, recent=5), PlainH2O),
        (SnapKV(budget=12, window=4, kernel=3), PlainSnapKV),
        (SnapKV(budget=9, window=5, kernel=5, pooling="average"), PlainSnapKV),
        (SnapKV(budget=6, window=6, kernel=1), PlainSnapKV),
    ],
    ids=lambda part: part.__name__ if isinstance(part, type) else repr(part),
)
@pytest.mark.parametrize("chunks", [[24, *[1] * 8], [3, *[1] * 29], [14, 1, 1, 9, 1, 6]], ids=str)
def test_contents_are_those_of_the_plain_recomputation(llama, tokens, policy, plain, chunks):
    ids = tokens(2, 32)
    logits, cache = in_chunks(llama, policy, ids, chunks)
    reference = plain(policy)
    torch.testing.assert_close(logits, reference.run(llama, ids, chunks), **CLOSE)
    assert_same_contents(cache, reference)


@pytest.mark.parametrize(
    ("policy", "plain"),
    [(H2O(budget=8, recent=3), PlainH2O), (SnapKV(budget=8, window=3, kernel=3), PlainSnapKV)],
    ids=lambda part: part.__name__ if isinstance(part, type) else repr(part),
)
def test_padding_is_never_chosen_before_a_token(llama, tokens, policy, plain):
    ids = tokens(2, 28)
    mask = (torch.arange(28) >= torch.tensor([[0], [13]])).long()
    chunks = [20, *[1] * 8]
    logits, cache = in_chunks(llama, policy, ids, chunks, mask)
    reference = plain(policy)
    expected = reference.run(llama, ids, chunks, mask)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE)
    assert_same_contents(cache, reference, mask)


def test_a_long_prompt_is_summed_in_tiles(llama, tokens):
    """More queries than the weights of which are held at once."""
    policy, ids = H2O(budget=40, recent=10), tokens(1, 300)
    logits, cache = in_chunks(llama, policy, ids, [290, *[1] * 10])
    reference = PlainH2O(policy)
    torch.testing.assert_close(logits, reference.run(llama, ids, [290, *[1] * 10]), **CLOSE)
    assert_same_contents(cache, reference)


def test_what_h2o_keeps_by_hand(llama):
    """Two tokens: the heavy hitter and the last; the third token's arrival drops the lighter of the others."""
    layer = H2O(budget=2, recent=1).layer(llama.config, 0)
    key = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])[None]  # the first is liked
    query = torch.tensor([[[5.0, 0.0]] * 3])[None]
    layer.update(key, key)
    layer.step(llama, query, Visible(rule, 0, 3, None, "cpu"), 1.0)
    assert layer.store.held("positions").tolist() == [[[0, 2]]]
    heavy = math.exp(5) / (math.exp(5) + 1), math.exp(5) / (math.exp(5) + 2)
    assert layer.store.held("scores")[0, 0].tolist() == pytest.approx([1 + sum(heavy), 1 / (math.exp(5) + 2)])


def rule(batch, head, query, key):
    return key <= query


@pytest.mark.parametrize("policy", [Streaming(2, 5), Streaming(0, 1), Streaming(5, 70), Streaming(3, 500)], ids=repr)
@pytest.mark.parametrize("chunks", [[150], [140, *[1] * 10], [1, 4, 90, 1, 54]], ids=str)
def test_streaming_is_masked_attention(llama, tokens, policy, chunks):
    ids = tokens(1, 150)
    dense = sinks_and_window(policy.sinks, policy.recent).tensor(150, 150)

    def masked(module, query, key, value, visible, scale):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, dense, scale=scale, enable_gqa=True)

    with attach(llama, masked):
        expected = llama(ids, use_cache=False).logits
    logits, cache = in_chunks(llama, policy, ids, chunks)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert cache.bytes_held == policy.promised_bytes(llama.config, 1, 150)


def test_a_cut_prompt_holds_what_snapkv_promises_for_it(llama, tokens):
    policy = SnapKV(budget=12, window=4)
    _, cache = in_chunks(llama, policy, tokens(2, 40), [32, *[1] * 8])
    assert cache.bytes_held == policy.promised_bytes(llama.config, 2, 40, prompt=32)
    assert cache.bytes_held < policy.promised_bytes(llama.config, 2, 40)


def test_bookkeeping_is_counted_beside(llama, tokens):
    _, cache = in_chunks(llama, H2O(budget=8), tokens(1, 20), [20])
    slots = 8 * llama.config.num_key_value_heads * llama.config.num_hidden_layers
    assert cache.bytes_of_bookkeeping == slots * (4 + 4)  # a position and a score
    assert in_chunks(llama, Full(), tokens(1, 20), [20])[1].bytes_of_bookkeeping == 0


def test_a_sliding_window_hides_what_a_policy_still_holds(mistral, tokens):
    ids = tokens(1, 30)
    for policy in (Full(), Streaming(sinks=4, recent=8), SnapKV(budget=20, window=8), H2O(budget=30)):
        logits, _ = in_chunks(mistral, policy, ids, [30])
        torch.testing.assert_close(logits, mistral(ids).logits, **CLOSE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Streaming(sinks=-1), "sinks must be at least 0, got -1"),
        (lambda: Streaming(recent=0), "recent must be at least 1"),
        (lambda: H2O(budget=0), "budget must be at least 1 token, got 0"),
        (lambda: H2O(budget=4, recent=5), "recent must be from 1 to the budget of 4 tokens, got 5"),
        (lambda: SnapKV(budget=0), "budget must be at least 1 token, got 0"),
        (lambda: SnapKV(budget=8, window=9), "window must be from 1 to the budget of 8 tokens, got 9"),
        (lambda: SnapKV(kernel=4), "kernel must be an odd number of tokens, got 4"),
    ],
)
def test_options_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_file_of_another_policy_is_named(tmp_path):
    Streaming().save(tmp_path)
    with pytest.raises(ValueError, match=r"policy\.json holds the policy 'Streaming', expected 'Full'"):
        Full.load(tmp_path)
    path = tmp_path / "policy.json"
    path.write_text(path.read_text().replace("sinks", "sinkers"))
    with pytest.raises(ValueError, match="has the option 'sinkers', which Streaming does not know"):
        Streaming.load(tmp_path)
