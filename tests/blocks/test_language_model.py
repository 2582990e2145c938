import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from regard.attention.tree import tree_leaves, tree_map
from regard.blocks.convolution import CausalConvolution
from regard.blocks.feedforward import SwiGLU
from regard.blocks.language_model import LanguageModel, LanguageModelConfig, sample
from regard.blocks.softmax_attention import SoftmaxAttention

MIXERS = {"conv": lambda dim: CausalConvolution(dim, 3), "softmax": lambda dim: SoftmaxAttention(dim, 2)}


def model(layout: str = "conv softmax", **options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(LanguageModelConfig(vocab_size=29, dim=16, layout=layout, init_std=1.0, **options), MIXERS)


def text(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(29, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(0, 6), min_size=1, max_size=5), batch=st.integers(1, 3))
def test_any_chunks_equal_the_whole_in_logits_and_state(chunks, batch):
    language_model, tokens = model("(conv softmax)*2"), text(batch, sum(chunks))
    whole, end = language_model(tokens)
    state, parts = language_model.initial(batch), []
    for chunk in tokens.split(chunks, dim=1):
        part, state = language_model(chunk, state)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)
    for one, other in zip(tree_leaves(state), tree_leaves(end), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_no_logit_depends_on_a_later_token():
    language_model, tokens = model(), text(2, 9)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 29
    assert torch.allclose(language_model(tokens)[0][:, :5], language_model(changed)[0][:, :5], atol=1e-5)
    assert not torch.allclose(language_model(tokens)[0][:, 5], language_model(changed)[0][:, 5])


def test_layers_follow_the_layout():
    kinds = [type(layer.mixer) for layer in model("(conv softmax)*2 conv").layers]
    assert kinds == [CausalConvolution, SoftmaxAttention, CausalConvolution, SoftmaxAttention, CausalConvolution]


def test_the_vocabulary_is_padded_inside_only():
    language_model = model(vocab_multiple=8)
    assert language_model.embedding.weight.shape == (32, 16)
    assert language_model(text(1, 3))[0].shape == (1, 3, 29)


def test_the_head_is_tied_or_its_own():
    tied, own = model(), model(tied=False)
    assert tied.head.weight is tied.embedding.weight
    assert own.head.weight is not own.embedding.weight
    assert torch.equal(own.embedding.weight, tied.embedding.weight)  # the seed alone decides


def test_norm_and_feedforward_are_parts():
    config = LanguageModelConfig(vocab_size=29, dim=16, layout="conv")
    other = LanguageModel(config, MIXERS, norm=nn.LayerNorm, feedforward=None)
    assert isinstance(other.norm, nn.LayerNorm) and other.layers[0].feedforward is None
    assert other(text(1, 4))[0].shape == (1, 4, 29)
    wide = LanguageModel(config, MIXERS, feedforward=lambda dim: SwiGLU(dim, 256))
    assert wide.layers[0].feedforward.fc2.in_features == 256


def test_the_residual_stream_is_fp32_in_a_half_precision_model():
    language_model, seen = model().bfloat16(), []
    for layer in language_model.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output[0].dtype]))
    logits, state = language_model(text(2, 5))
    assert set(seen) == {torch.float32}
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert torch.allclose(logits.float(), model()(text(2, 5))[0], atol=0.05, rtol=0.1)
    assert language_model.step(text(2, 1)[:, 0], state)[0].shape == (2, 29)


def test_generating_equals_reading_everything_again_for_each_token():
    language_model, prompt = model(), text(2, 4)
    made = torch.stack(list(language_model.generate(prompt, 12)), dim=1)
    tokens = prompt
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat([tokens, language_model(tokens)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, tokens[:, 4:])


def test_the_seed_decides_what_is_drawn():
    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [int(t) for t in model().generate(text(1, 3), 20, temperature=1.0, top_p=0.9, generator=generator)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_generation_streams_and_leaves_gradients_as_they_were():
    stream = model().generate(text(1, 3), 10_000_000)
    next(stream)
    assert torch.is_grad_enabled()


def test_a_nucleus_holds_the_likeliest_tokens_that_reach_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    share = sample(logits, 1.0, 0.7, generator).bincount(minlength=4) / 4000
    assert torch.allclose(share, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert set(sample(logits, 1.0, 0.01, generator).tolist()) == {0}
    assert set(sample(logits, 1.0, 1.0, generator, top_k=2).tolist()) == {0, 1}
    assert set(sample(logits, 5.0, 0.5, generator, top_k=1).tolist()) == {0}
    share = sample(logits, 0.5, 1.0, generator).bincount(minlength=4) / 4000
    assert torch.allclose(share, torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.03)
    assert set(sample(logits, 0.0, 1.0).tolist()) == {0}


def test_state_bytes_are_those_of_the_stored_tensors():
    language_model = model()
    assert language_model.state_bytes() == 2 * 16 * 4  # two inputs of the convolution; no keys yet
    _, state = language_model(text(1, 10))
    assert language_model.state_bytes(state) == (2 * 16 + 2 * 10 * 16) * 4


def test_a_few_steps_of_training_lower_the_loss():
    language_model, tokens = model(), text(4, 12)
    optimiser = torch.optim.AdamW(language_model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(language_model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_saved_weights_give_the_same_logits(tmp_path):
    language_model, other = model(), model("conv softmax")
    with torch.no_grad():
        other.embedding.weight.add_(1.0)
    torch.save(language_model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(text(1, 6))[0], language_model(text(1, 6))[0])


def test_rows_of_the_state_can_be_picked():
    language_model, tokens = model(), text(3, 6)
    _, state = language_model(tokens[:, :5])
    rows = torch.tensor([2, 2])
    logits, _ = language_model(tokens[rows, 5:], tree_map(lambda part: part[rows], state))
    assert torch.allclose(logits, language_model(tokens)[0][rows, 5:], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
        (dict(dim=-1), "dim must be at least 1, got -1"),
        (dict(vocab_multiple=0), "vocab_multiple must be at least 1, got 0"),
        (dict(init_std=0.0), "init_std must be positive, got 0.0"),
        (dict(layout="(conv"), "a parenthesis is not closed"),
    ],
)
def test_a_config_checks_itself(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**{"vocab_size": 29, "dim": 16, "layout": "conv"} | options)


def test_an_unknown_mixer_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="layout names the mixer 'mamba', which is not among conv, softmax"):
        model("conv mamba")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (text(1, 0), {}, "prompt must hold at least one token, got \\(1, 0\\)"),
        (torch.tensor([[3, 29]]), {}, "prompt must hold tokens in \\[0, 29\\), got \\[3, 29\\]"),
        (text(1, 3), dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (text(1, 3), dict(temperature=-1.0), "temperature must be 0 or positive, got -1.0"),
        (text(1, 3), dict(temperature=float("nan")), "temperature must be 0 or positive, got nan"),
        (text(1, 3), dict(top_p=0.0), "top_p must be in \\(0, 1\\], got 0.0"),
        (text(1, 3), dict(top_k=0), "top_k must be at least 1, got 0"),
    ],
)
def test_generation_refuses_options_out_of_range_at_once(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        model().generate(prompt, **{"max_new_tokens": 2} | options)
