import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.data.mqar import IGNORED, mqar


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(pairs=st.integers(1, 8), spare=st.integers(0, 9), seed=st.integers(0, 99))
def test_every_key_is_asked_for_once_and_the_label_is_its_value(pairs, spare, seed):
    length, vocab = 4 * pairs + 2 * spare, 64
    tokens, labels = mqar(5, pairs, length, vocab, generator=seeded(seed))
    assert tokens.shape == labels.shape == (5, length)
    assert tokens.min() >= 0 and tokens.max() < vocab
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        keys, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < vocab // 2 for key in keys)
        assert all(vocab // 2 <= value < vocab for value in values)
        asked = [place for place in range(length) if label[place] != IGNORED]
        assert all(place >= 2 * pairs and place % 2 == 0 for place in asked)
        assert sorted(row[place] for place in asked) == sorted(keys)
        value_of = dict(zip(keys, values, strict=True))
        assert all(label[place] == value_of[row[place]] for place in asked)


def test_a_worked_example_with_one_way_to_place_the_keys():
    tokens, labels = mqar(1, 2, length=8, vocab=6, generator=seeded(0))  # keys {1, 2}, two slots: both are asked
    keys = tokens[0, [0, 2]].tolist()
    assert sorted(keys) == [1, 2]
    assert sorted(tokens[0, [4, 6]].tolist()) == [1, 2]
    assert labels[0, [0, 1, 2, 3, 5, 7]].tolist() == [IGNORED] * 6
    first = tokens[0, 1 if tokens[0, 4] == keys[0] else 3]
    assert labels[0, 4] == first


def test_the_power_law_prefers_early_slots():
    _, labels = mqar(4000, 1, length=22, vocab=8, generator=seeded(0))  # ten slots
    share = (labels[:, 2::2] != IGNORED).double().mean(0)
    weight = torch.arange(1, 11, dtype=torch.float64) ** -0.99
    assert torch.allclose(share, weight / weight.sum(), atol=0.03)


def test_the_seed_decides():
    first, again, other = (mqar(4, 4, generator=seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(count=0, pairs=4), "count and pairs must be at least 1, got count 0"),
        (dict(count=1, pairs=0), "pairs 0"),
        (dict(count=1, pairs=4, length=14), "length must be even and at least 4 \\* pairs = 16, got 14"),
        (dict(count=1, pairs=4, length=17), "got 17"),
        (dict(count=1, pairs=4, vocab=8), "vocab must be even and at least 2 \\* pairs \\+ 2 = 10, got 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mqar(**arguments)
