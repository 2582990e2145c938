"""Text piece by piece: the same as transformers makes, in whole characters, and counted."""

from dataclasses import replace

import pytest
import torch

from regard.llm import H2O, Full, SnapKV, Streaming, use
from regard.llm.generate import CHUNK, Generation, Sampling, Summary, TextStream, encode, end_tokens
from regard.llm.load import Loaded

TEXT = "Attention is looking at what matters, and at little else. " * 3


@pytest.fixture
def loaded(llama, tokenizer):
    return Loaded(llama, tokenizer, "tiny")


@pytest.fixture
def prompt(tokenizer):
    return encode(tokenizer, TEXT, in_chat=False)


def made(generation: Generation) -> tuple[str, Summary]:
    text = "".join(generation)
    assert generation.summary is not None
    return text, generation.summary


@pytest.mark.parametrize("policy", [Full(), Streaming(2, 20), H2O(30), SnapKV(30, 8)], ids=lambda p: type(p).__name__)
def test_the_text_is_the_one_that_transformers_makes(loaded, prompt, policy):
    text, summary = made(Generation(loaded, prompt, policy, Sampling(max_new_tokens=20)))
    with use(loaded.model, policy) as model:
        tokens = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    expected = loaded.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
    assert text == expected
    assert summary.new_tokens == 20 and summary.stopped == "length"
    assert summary.prefill_seconds > 0 and summary.decode_seconds > 0


def test_what_is_held_is_counted(loaded, prompt):
    config, tokens = loaded.model.config, prompt.shape[1] + 19
    _, streaming = made(Generation(loaded, prompt, Streaming(2, 20), Sampling(max_new_tokens=20)))
    assert streaming.bytes_held == Streaming(2, 20).promised_bytes(config, 1, tokens)
    assert streaming.bytes_of_full_attention == Full().promised_bytes(config, 1, tokens)
    assert streaming.bytes_of_bookkeeping == 0
    _, full = made(Generation(loaded, prompt, Full(), Sampling(max_new_tokens=20)))
    assert full.bytes_held == full.bytes_of_full_attention
    _, h2o = made(Generation(loaded, prompt, H2O(30), Sampling(max_new_tokens=20)))
    assert h2o.bytes_of_bookkeeping > 0
    assert full.tokens_per_second == pytest.approx(19 / full.decode_seconds)
    assert replace(full, decode_seconds=0.0).tokens_per_second == 0.0


@pytest.mark.parametrize(
    ("policy", "chunk", "lengths"),
    [
        (Full(), None, [CHUNK, 88]),
        (H2O(30), None, [600]),
        (H2O(30), 250, [250, 250, 100]),
        (Streaming(2, 20), 400, [400, 200]),
    ],
)
def test_a_prompt_is_read_whole_where_its_chunks_would_matter(loaded, tokens, policy, chunk, lengths):
    read = []
    hook = loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    heard = []
    try:
        generation = Generation(
            loaded, tokens(1, 600), policy, Sampling(max_new_tokens=2), prefill_chunk=chunk, on_read=heard.append
        )
        made(generation)
    finally:
        hook.remove()
    assert read == [*lengths, 1]
    assert heard == sorted(heard) and heard[-1] == 600 and 0 < heard[0] < 600


def test_a_text_ends_where_the_model_says(loaded, prompt, monkeypatch):
    tokens = loaded.model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    end = tokens[6]
    first = tokens.index(end)
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [1, end])
    text, summary = made(Generation(loaded, prompt, Full(), Sampling(max_new_tokens=12)))
    assert summary.stopped == "end" and summary.new_tokens == first + 1
    assert text == loaded.tokenizer.decode(tokens[:first], skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
    assert end_tokens(loaded) == {1, end}


def test_a_model_that_names_no_end_uses_its_tokenizers(loaded):
    assert loaded.model.generation_config.eos_token_id is None
    assert end_tokens(loaded) == {loaded.tokenizer.eos_token_id}


def test_the_models_context_is_the_limit(loaded, tokens, monkeypatch):
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 30)
    with pytest.raises(ValueError, match="the prompt has 31 tokens, more than the model's context of 30"):
        Generation(loaded, tokens(1, 31), Full())
    _, summary = made(Generation(loaded, tokens(1, 28), Full(), Sampling(max_new_tokens=10)))
    assert summary.stopped == "context" and summary.new_tokens == 3
    _, summary = made(Generation(loaded, tokens(1, 30), Full(), Sampling(max_new_tokens=1)))
    assert summary.stopped == "length"


def test_draws_depend_on_the_seed_alone(loaded, prompt):
    def drawn(**options):
        return made(Generation(loaded, prompt, Full(), Sampling(max_new_tokens=15, **options)))[0]

    warm = drawn(temperature=1.0, seed=3)
    torch.manual_seed(77)
    assert drawn(temperature=1.0, seed=3) == warm
    assert drawn(temperature=1.0, seed=4) != warm
    assert drawn(temperature=1.0, top_p=1e-6) == drawn()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or positive, got -1.0"),
        ({"temperature": float("inf")}, "temperature must be 0 or positive, got inf"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_a_chunk_must_hold_a_token(loaded, prompt):
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1, got 0"):
        Generation(loaded, prompt, Full(), prefill_chunk=0)


def test_overflow_is_said(loaded, prompt, monkeypatch):
    monkeypatch.setattr(loaded.model.lm_head, "forward", lambda hidden: torch.full((1, 1, 259), torch.nan))
    with pytest.raises(ValueError, match=r"the model's numbers overflow in torch\.float32; load it with another dtype"):
        made(Generation(loaded, prompt, Full()))


def test_a_text_that_is_given_up_leaves_the_model_as_it_was(loaded, prompt):
    before = loaded.model.config._attn_implementation
    hooks = [len(layer._forward_hooks) for layer in loaded.model.model.layers]  # transformers leaves some of its own
    pieces = iter(Generation(loaded, prompt, Streaming(2, 20)))
    next(pieces)
    assert loaded.model.config._attn_implementation != before
    pieces.close()
    assert loaded.model.config._attn_implementation == before and torch.is_grad_enabled()
    assert [len(layer._forward_hooks) for layer in loaded.model.model.layers] == hooks


def test_characters_come_whole(tokenizer):
    text = "naïve 世界 🙂!"
    stream = TextStream(tokenizer, tokenizer("so: ").input_ids)
    pieces = [stream.add(token) for token in tokenizer(text).input_ids]
    assert "".join(pieces) == text and all(len(piece) <= 1 for piece in pieces)
    assert stream.rest() == ""
    for token in tokenizer("a🙂").input_ids[:-1]:
        stream.add(token)
    assert stream.rest() == ""  # of a character that was cut off, nothing is shown


def test_a_text_with_bytes_that_are_no_character_goes_on(tokenizer):
    stream = TextStream(tokenizer, [])
    stray = tokenizer("é").input_ids[1]
    assert stream.add(stray) == ""
    assert stream.add(tokenizer("x").input_ids[0]) == "\N{REPLACEMENT CHARACTER}x"


def test_special_tokens_are_not_text(tokenizer):
    stream = TextStream(tokenizer, [])
    assert [stream.add(token) for token in (1, *tokenizer("ok").input_ids, 2)] == ["", "o", "k", ""]


def test_prompts_in_and_out_of_the_chat_format(tokenizer, monkeypatch):
    assert (
        tokenizer.decode(encode(tokenizer, "Hi", "Be brief")[0])
        == "<s>system: Be brief</s><s>user: Hi</s><s>assistant:"
    )
    assert tokenizer.decode(encode(tokenizer, "Hi", in_chat=False)[0]) == "Hi"
    with pytest.raises(ValueError, match="the prompt is empty; it must contain text"):
        encode(tokenizer, " \n")
    with pytest.raises(ValueError, match="a system message needs the model's chat format"):
        encode(tokenizer, "Hi", "Be brief", in_chat=False)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role here') }}")
    with pytest.raises(ValueError, match="chat template refuses this conversation: no system role here"):
        encode(tokenizer, "Hi", "Be brief")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert tokenizer.decode(encode(tokenizer, "Hi")[0]) == "Hi"
