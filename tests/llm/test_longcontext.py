"""What is hidden is truly there, in contexts of the length asked for, and what is scored is what was asked."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from regard.data.text import python_reference
from regard.llm import H2O, Full, Streaming
from regard.llm.longcontext import (
    NATO,
    TASKS,
    Haystack,
    Prompt,
    Turn,
    accuracy,
    answers,
    bytes_held,
    common_words,
    matched,
    multi_needle,
    multi_query,
    new_cache,
    passkeys,
    read,
    recall,
    variable_tracking,
)

CONTEXT = 1500
CLOSE = dict(rtol=1e-4, atol=1e-4)
GENERATORS = {"passkeys": passkeys, **TASKS}
every_generator = pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS)


@pytest.fixture(scope="module")
def haystack(tokenizer) -> Haystack:
    return Haystack(tokenizer, python_reference()[:200_000])


@pytest.fixture(scope="module")
def short(haystack) -> list[Prompt]:
    """For models: two passkeys of two words each."""
    return passkeys(haystack, 2, context=230, count=2, words=1)


def text(haystack: Haystack, tokens: torch.Tensor) -> str:
    return haystack.tokenizer.decode(tokens)


# Prompts


@every_generator
def test_the_same_seed_gives_the_same_prompts(haystack, generate):
    first, again = (generate(haystack, 3, context=CONTEXT, seed=5) for _ in range(2))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert torch.equal(generate(haystack, 1, context=CONTEXT, seed=5)[0].tokens, first[0].tokens), "however many"
    others = [*generate(haystack, 3, context=CONTEXT, seed=6), *generate(haystack, 3, context=CONTEXT, split="train")]
    texts = {text(haystack, prompt.context) for prompt in (*first, *others)}
    assert len(texts) == 9


@every_generator
def test_contexts_are_as_long_as_asked(haystack, generate):
    for context in (CONTEXT, CONTEXT + 1):
        lengths = {len(prompt.context) for prompt in generate(haystack, 4, context=context)}
        if generate is common_words:  # a list of whole lines
            assert all(context - 30 < length <= context for length in lengths)
        else:
            assert lengths == {context}


def test_passkeys_are_in_their_sentences_in_order(haystack):
    for prompt in passkeys(haystack, 5, context=CONTEXT, count=3, words=4):
        context, tail = text(haystack, prompt.context), text(haystack, prompt.tail)
        places = []
        for nth, turn in zip(("first", "second", "third"), prompt.turns, strict=True):
            (key,) = turn.expected
            assert len(key.split()) == 4 and set(key.split()) <= set(NATO)
            places.append(context.index(f"\n\nRemember the {nth} passkey. The {nth} passkey is: {key}.\n\n"))
            assert f"What is the {nth} passkey? The {nth} passkey is: {key}" in tail
            assert text(haystack, turn.answer) == f" {key}"
        assert places == sorted(places)
        assert text(haystack, prompt.tail[prompt.scored]) == "".join(f" {turn.expected[0]}" for turn in prompt.turns)


def test_depths_are_where_they_were_asked_for(haystack):
    for depths in ((0.0, 0.1), (0.9, 1.0)):
        for prompt in passkeys(haystack, 6, context=CONTEXT, count=1, words=2, depths=depths):
            before, found, _ = text(haystack, prompt.context).partition("\n\nRemember the first passkey")
            hay = CONTEXT - len(f"{found}. The first passkey is: {prompt.turns[0].expected[0]}.\n\n")
            assert found and depths[0] - 0.01 <= len(before.encode()) / hay <= depths[1] + 0.01


@pytest.mark.parametrize("generate", [TASKS["single_needle"], multi_needle, multi_query])
def test_numbers_are_in_the_context_with_the_words_that_ask_for_them(haystack, generate):
    asked = {TASKS["single_needle"]: 1, multi_needle: 1, multi_query: 4}[generate]
    hidden = {TASKS["single_needle"]: 1, multi_needle: 4, multi_query: 4}[generate]
    for prompt in generate(haystack, 4, context=CONTEXT):
        context, (turn,) = text(haystack, prompt.context), prompt.turns
        question = text(haystack, turn.question)
        assert context.count("The special number for ") == hidden and len(turn.expected) == asked
        for number in turn.expected:
            _, _, rest = context.rpartition(f" is {number}.\n\n")[0].rpartition("special number for ")
            assert rest in question and rest.isalpha()
            assert number not in question and number in text(haystack, turn.answer)


def test_chains_of_variables_can_be_followed(haystack):
    for prompt in variable_tracking(haystack, 4, context=CONTEXT, hops=3, chains=2):
        context, (turn,) = text(haystack, prompt.context), prompt.turns
        value = text(haystack, turn.question).split("have the value ")[1].split(",")[0]
        values: dict[str, str] = {}
        for line in context.splitlines():
            if line.startswith("VAR ") and line.count(" = ") == 1:
                name, given = line.removeprefix("VAR ").split(" = ")
                values[name] = values[given.removeprefix("VAR ")] if given.startswith("VAR ") else given
        assert len(values) == 2 * 4
        assert {name for name, held in values.items() if held == value} == set(turn.expected)


def test_common_words_are_the_most_common(haystack):
    for prompt in common_words(haystack, 3, context=CONTEXT, common=3, repeats=8, rare_repeats=2):
        lines = [line for line in text(haystack, prompt.context).splitlines() if ". " in line][1:]
        words, counts = np.unique([line.split(". ")[1] for line in lines], return_counts=True)
        assert {str(word) for word in words[counts == 8]} == set(prompt.turns[0].expected)
        assert set(counts) == {2, 8}


@every_generator
def test_the_splits_share_no_text(tokenizer, generate):
    """A haystack whose halves have no word in common."""
    halves = [" ".join(f"{letter}{chr(97 + i % 26)}{chr(97 + i // 26)}x" for i in range(600)) + " " for letter in "qz"]
    haystack = Haystack(tokenizer, "".join(halves), held_out=0.5)
    options = dict(common=3, repeats=4) if generate is common_words else {}
    for split, own, other in (("train", "q", "z"), ("held_out", "z", "q")):
        for prompt in generate(haystack, 3, context=CONTEXT, split=split, **options):
            found = {word[0] for word in text(haystack, prompt.context).split() if len(word) == 4 and word[3] == "x"}
            assert own in found and other not in found


def test_a_haystack_begins_again_where_it_ends(tokenizer):
    haystack = Haystack(tokenizer, "abcdefgh", held_out=0.5)
    drawn = haystack.draw(11, "held_out", np.random.default_rng(0))
    assert haystack.tokenizer.decode(drawn) in "efgh" * 4


def test_a_start_token_comes_first_where_the_tokenizer_sets_one(tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    begins = deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    haystack = Haystack(begins, "some words to hide things in. " * 40)
    for generate in (passkeys, common_words):
        options = dict(common=2, repeats=3) if generate is common_words else dict(count=1, words=2)
        (prompt,) = generate(haystack, 1, context=400, **options)
        assert prompt.context[0] == 1 and (prompt.tokens[1:] != 1).all()
        assert len(prompt.context) == 400 or generate is common_words


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda h: passkeys(h, 0), "number must be at least 1, got 0"),
        (lambda h: passkeys(h, 1, context=-5), "context must be at least 1, got -5"),
        (lambda h: passkeys(h, 1, context=100), r"context must be at least \d+ tokens to hide all, got 100"),
        (lambda h: passkeys(h, 1, count=21), "count must be at most 20, got 21"),
        (lambda h: multi_needle(h, 1, needles=0), "needles must be at least 1, got 0"),
        (lambda h: multi_needle(h, 1, needles=10**6), r"needles must be at most \d+, the words of the haystack"),
        (lambda h: variable_tracking(h, 1, hops=0), "hops must be at least 1, got 0"),
        (lambda h: common_words(h, 1, context=200), "context must be longer to list 5 words 15 times each, got 200"),
        (lambda h: common_words(h, 1, rare_repeats=15), "rare_repeats must be less than repeats, got 15 and 15"),
        (lambda h: common_words(h, 1, common=10**6), r"common must be at most \d+, the words of the haystack"),
        (lambda h: Haystack(h.tokenizer, "  "), "the haystack's text is empty"),
        (lambda h: Haystack(h.tokenizer, "a"), "too short to be split in two regions"),
        (lambda h: Haystack(h.tokenizer, "text", held_out=1.0), "held_out must be between 0 and 1, got 1.0"),
    ],
)
def test_what_cannot_be_made_is_named(haystack, make, message):
    with pytest.raises(ValueError, match=message):
        make(haystack)


# Scores


def test_recall_is_the_loss_of_the_answers(llama, haystack, short):
    result = recall(llama, short)
    for index, prompt in enumerate(short):
        with torch.no_grad():
            logits = llama(prompt.tokens[None]).logits[0, len(prompt.context) - 1 : -1]
        loss = cross_entropy(logits, prompt.tail, reduction="none")[prompt.scored]
        hits = (logits.argmax(-1) == prompt.tail)[prompt.scored].float()
        assert result.losses[index].item() == pytest.approx(loss.mean().item(), rel=1e-4)
        assert result.hits[index].item() == pytest.approx(hits.mean().item())
    assert result.loss == pytest.approx(result.losses.mean().item())
    assert result.bytes_held == max(len(p.tokens) - 1 for p in short) * 2 * 2 * 8 * 4 * 3


def test_full_recalls_what_the_untouched_model_does(llama, short):
    untouched, full = recall(llama, short), recall(llama, short, Full(), prefill_chunk=50)
    torch.testing.assert_close(full.losses, untouched.losses, **CLOSE)
    assert full.bytes_held == untouched.bytes_held


def test_the_tail_comes_as_generation_would_read_it(llama, short):
    """All at once where that changes nothing, one by one where the policy looks at what comes together."""
    some, streaming, heavy = (
        [replace(short[0], turns=short[0].turns[:1])],
        Streaming(sinks=4, recent=60),
        H2O(budget=64),
    )
    at_once = recall(llama, some, streaming)
    torch.testing.assert_close(at_once.losses, recall(llama, some, streaming, tail_step=1).losses, **CLOSE)
    assert at_once.bytes_held == streaming.promised_bytes(llama.config, 1, 10_000)
    one_by_one = recall(llama, some, heavy)
    assert torch.equal(one_by_one.losses, recall(llama, some, heavy, tail_step=1).losses)
    assert (recall(llama, some, heavy, tail_step=1 << 30).losses - one_by_one.losses).abs().max() > 1e-4


def test_answers_are_greedy_and_follow_each_other(llama, tokenizer, short):
    prompt = short[0]
    given = answers(llama, tokenizer, prompt)
    said = prompt.context
    for turn, answer in zip(prompt.turns, given, strict=True):
        said = torch.cat([said, turn.question])
        new = len(turn.answer)
        whole = llama.generate(
            said[None], attention_mask=torch.ones_like(said)[None], max_new_tokens=new, min_new_tokens=new
        )[0]
        assert tokenizer.decode(whole[len(said) :], skip_special_tokens=True) == answer
        said = whole
    assert answers(llama, tokenizer, prompt, Full(), prefill_chunk=40) == given


def test_accuracy_is_the_share_of_strings_found(llama, tokenizer, short):
    def expecting_its_own(prompt: Prompt) -> Prompt:
        given = answers(llama, tokenizer, prompt)
        return replace(prompt, turns=tuple(replace(t, expected=(a,)) for t, a in zip(prompt.turns, given, strict=True)))

    own = [expecting_its_own(prompt) for prompt in short]
    assert accuracy(llama, tokenizer, own, extra_tokens=0) == 1.0
    impossible = replace(own[0].turns[0], expected=("\U0001f600",))
    half = [replace(own[0], turns=(impossible, own[0].turns[1]))]
    assert accuracy(llama, tokenizer, half, extra_tokens=0) == 0.5
    assert accuracy(llama, tokenizer, half, Full(), extra_tokens=0) == 0.5


def test_matched_looks_for_every_string():
    assert matched(" The ALPHA bravo.", ("alpha bravo",)) == 1.0
    assert matched("1234567, 7654321", ("1234567", "1111111", "7654321", "2222222")) == 0.5
    assert matched("", ("x",)) == 0.0


def test_a_context_is_read_in_chunks(mistral, tokens):
    ids = tokens(1, 50)[0]
    caches = [new_cache(mistral, policy) for policy in (None, None)]
    with torch.no_grad():
        whole, parts = read(mistral, ids, caches[0]), read(mistral, ids, caches[1], chunk=7)
        torch.testing.assert_close(parts, whole, **CLOSE)
        torch.testing.assert_close(whole, mistral(ids[None]).logits[0, -1:], **CLOSE)
    with pytest.raises(ValueError, match="prefill chunk must be at least 1 token, got 0"):
        read(mistral, ids, caches[0], chunk=0)


def test_bytes_of_any_cache_are_counted(llama, tokens):
    cache = DynamicCache(config=llama.config)
    assert bytes_held(cache) == 0
    llama(tokens(2, 9), past_key_values=cache)
    assert bytes_held(cache) == 2 * 2 * 9 * 2 * 8 * 4 * 3


@pytest.mark.parametrize("score", [lambda model, tokenizer: recall(model, []), lambda m, t: accuracy(m, t, [])])
def test_no_prompts_are_refused(llama, tokenizer, score):
    with pytest.raises(ValueError, match="prompts must contain at least one prompt"):
        score(llama, tokenizer)


def test_progress_sees_every_prompt(llama, short):
    seen = []

    def progress(prompts):
        for prompt in prompts:
            seen.append(prompt)
            yield prompt

    recall(llama, short, progress=progress)
    assert seen == short


def test_turns_join_to_a_tail():
    turns = tuple(Turn(torch.tensor([i, i]), torch.tensor([10 + i]), ("x",)) for i in (1, 2))
    prompt = Prompt(torch.tensor([7, 8]), turns)
    assert prompt.tail.tolist() == [1, 1, 11, 2, 2, 12]
    assert prompt.scored.tolist() == [False, False, True] * 2
    assert prompt.tokens.tolist() == [7, 8, 1, 1, 11, 2, 2, 12]
