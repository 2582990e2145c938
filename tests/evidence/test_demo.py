"""The document of the demonstration, what is measured on it, and the pictures; with a small random model."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.evidence import demo
from regard.llm import Full, Loaded, Streaming
from regard.llm.longcontext import NATO, Haystack, answers
from regard.papers.duo_attention import Gates, random_gates

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 60


@pytest.fixture(scope="module")
def loaded(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=900,
        initializer_range=0.2,
    )
    return Loaded(LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer, "tiny")


@pytest.fixture(scope="module")
def haystack(loaded):
    return Haystack(loaded.tokenizer, TEXT)


@pytest.fixture(scope="module")
def document(haystack):
    return demo.hide(haystack, 400, 1, seed=3)


@pytest.fixture(scope="module")
def gates():
    return random_gates(3, 2, torch.Generator().manual_seed(5), sinks=4, recent=16)


@pytest.mark.parametrize(("passkeys", "seed"), [(1, 0), (2, 1), (3, 2)])
def test_the_passkeys_are_where_it_is_said(haystack, loaded, passkeys, seed):
    prompt, places = demo.hide(haystack, 700, passkeys, seed)
    assert len(prompt.context) == 700 and len(prompt.turns) == len(places) == passkeys
    found = []
    for turn, place in zip(prompt.turns, places, strict=True):
        hidden = loaded.tokenizer.decode(prompt.context[place.start : place.stop])
        asked, recited = loaded.tokenizer.decode(turn.question), loaded.tokenizer.decode(turn.answer)
        first = asked.split()[-1]
        assert f"passkey is: {first} {turn.expected[0]}.\n\n" in hidden and recited == f" {turn.expected[0]}"
        found += [first, *turn.expected[0].split()]
    assert len(set(found)) == len(found) == demo.WORDS * passkeys and set(found) <= set(NATO)
    assert [place.start * passkeys // 700 for place in places] == list(range(passkeys))  # one in each part


def test_a_seed_gives_one_document(haystack, document):
    again, other = demo.hide(haystack, 400, 1, seed=3)[0], demo.hide(haystack, 400, 1, seed=4)[0]
    assert torch.equal(again.tokens, document[0].tokens)
    assert not torch.equal(again.context, other.context) and again.turns[0].expected != other.turns[0].expected


@pytest.mark.parametrize(
    ("context", "passkeys", "message"),
    [
        (400, 0, "passkeys must be from 1 to 3, got 0"),
        (400, 4, "passkeys must be from 1 to 3, got 4"),
        (50, 1, r"tokens must be at least \d+ to hide 1 passkeys, got 50"),
    ],
)
def test_documents_that_cannot_be_made(haystack, context, passkeys, message):
    with pytest.raises(ValueError, match=message):
        demo.hide(haystack, context, passkeys)


def test_the_least_document_that_is_named_is_enough(haystack):
    with pytest.raises(ValueError, match="tokens must be at least") as raised:
        demo.hide(haystack, 1, 2)
    least = int(str(raised.value).split("at least ")[1].split()[0])
    assert len(demo.hide(haystack, least, 2)[0].context) == least
    with pytest.raises(ValueError, match="tokens must be at least"):
        demo.hide(haystack, least - 1, 2)


def test_the_last_two_ways_hold_the_same_bytes(loaded, gates):
    ways = demo.four_ways(gates, seed=1)
    full, streaming, arbitrary, duo = (policy.promised_bytes(loaded.model.config, 1, 400) for policy in ways.values())
    assert streaming < arbitrary == duo < full
    other = demo.four_ways(gates, seed=2)
    assert other["DuoAttention"] == ways["DuoAttention"] and other["half at random"] != ways["half at random"]


def test_what_does_not_fit_is_said_before_anything_runs(loaded, document):
    with pytest.raises(ValueError, match="the gates are for 4 layers x 2 KV heads, the model has 3 x 2"):
        demo.check(loaded, document[0], demo.four_ways(Gates(torch.rand(4, 2)), 0))
    long, _ = demo.hide(Haystack(loaded.tokenizer, TEXT), 890, 1)
    with pytest.raises(
        ValueError, match="tokens must leave room for the questions in the model's context of 900, got 890"
    ):
        demo.check(loaded, long, {"full": Full()})
    demo.check(loaded, document[0], {"full": Full()})


def test_a_row_is_what_was_measured(loaded, document):
    prompt, done = document[0], []
    row = demo.measure(loaded, prompt, "some way", Streaming(4, 16), done.append)
    assert sum(done) == pytest.approx(1.0) and min(done) > 0
    assert row.way == "some way" and row.loss > 0 and row.prefill_seconds > 0 and row.decode_seconds > 0
    assert row.bytes_held == Streaming(4, 16).promised_bytes(loaded.model.config, 1, 400)
    said = answers(loaded.model, loaded.tokenizer, prompt, Streaming(4, 16))
    assert row.answers == tuple(" ".join(text.split()) for text in said) and row.correct == 0
    again = demo.measure(loaded, prompt, "some way", Streaming(4, 16))
    assert replace(again, prefill_seconds=row.prefill_seconds, decode_seconds=row.decode_seconds) == row


def test_right_answers_are_counted(loaded, haystack, monkeypatch):
    prompt, _ = demo.hide(haystack, 300, 2)
    monkeypatch.setattr(demo, "answers", lambda *_: [f" {prompt.turns[0].expected[0].upper()}.\n", " alpha"])
    monkeypatch.setattr(
        demo,
        "recall",
        lambda *_, **__: type(
            "R", (), dict.fromkeys(("loss", "prefill_seconds", "tail_seconds"), 0.5) | {"bytes_held": 7}
        ),
    )
    row = demo.measure(loaded, prompt, "way", Full())
    assert row.correct == 1 and row.answers[1] == "alpha" and row.bytes_held == 7


def test_the_heads_that_are_shown_are_the_clearest_of_either_kind(loaded, document, gates):
    prompt, places = document
    policy = demo.four_ways(gates)["DuoAttention"]
    heads = demo.look(loaded, prompt, places, policy)
    assert [title.split()[0] for title in heads] == ["Retrieval", "Streaming"]
    weights = demo._weights(loaded.model, prompt)
    assert weights.shape == (3, 2, len(prompt.turns[0].answer), len(prompt.tokens))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    first = len(prompt.context) + len(prompt.turns[0].question) - 1
    assert weights[:, :, 0, first + 1 :].abs().max() == 0 < weights[:, :, 0, first].min()
    for title, kind in zip(heads, (True, False), strict=True):
        layer, head = map(int, title.split()[2].rstrip(":").split("."))
        assert bool(policy.retrieval[layer, head]) is kind
        torch.testing.assert_close(heads[title], weights[layer, head])
    on_passkey = weights[..., places[0].start : places[0].stop].sum(-1).mean(-1)
    assert f"{on_passkey[policy.retrieval].max():.0%} of its attention" in next(iter(heads))


def test_the_report_needs_no_other_file(loaded, document, gates):
    prompt, places = document
    rows = [demo.Row(way, ("a [bold] <b>",), 0, 1.25, 2_000_000, 1.0, 2.0) for way in demo.four_ways(gates)]
    heads = demo.look(loaded, prompt, places, demo.four_ways(gates)["DuoAttention"])
    page = demo.demo_report(loaded, prompt, places, rows, heads).html()
    assert page.count("data:image/png;base64,") == 2 and "a [bold] &lt;b&gt;" in page
    for text in ("half at random", "1.25", "0 of 1", prompt.turns[0].expected[0], "regard run duo_attention"):
        assert text in page
    assert "regard generate --model other " in demo.next_commands("other")[0]
