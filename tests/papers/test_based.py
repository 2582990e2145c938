import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.testing import assert_close

from regard.attention.tree import tree_bytes
from regard.blocks.language_model import LanguageModel, LanguageModelConfig
from regard.paper import Run
from regard.papers.based import (
    BaseConv,
    Based,
    BasedConfig,
    Recipe,
    SlidingWindowAttention,
    TaylorLinearAttention,
    claim,
    weights,
)
from regard.papers.based.mixer import windowed_attention

SMALL = BasedConfig(vocab_size=29, dim=16, layout="conv linear conv window", num_heads=2, feature_dim=3, window=4)


def small(**changes) -> Based:
    torch.manual_seed(0)
    model = Based(replace(SMALL, **changes))
    with torch.no_grad():
        for parameter in model.parameters():  # the published start is nearly zero
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def text(batch: int = 2, tokens: int = 20) -> torch.Tensor:
    return torch.randint(29, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def official(model: Based) -> dict[str, torch.Tensor]:
    """The model's weights under the authors' names."""
    names = {
        "embedding.weight": "transformer.embeddings.word_embeddings.weight",
        "norm.weight": "transformer.ln_f.weight",
        "head.weight": "lm_head.weight",
    }
    parts = {"mixer_norm": "norm1", "feedforward_norm": "norm2", "feedforward": "mlp"}
    theirs = {}
    for name, tensor in model.state_dict().items():
        if name not in names:
            _, layer, part, rest = name.split(".", 3)
            part, rest = parts.get(part, part), rest.replace("qkv_proj", "Wqkv")
            name = f"transformer.layers.{layer}.{part}.{rest}"
        theirs[names.get(name, name)] = tensor.clone()
    return theirs


def official_json(**changes) -> dict:
    return {
        "vocab_size": 29,
        "n_embd": 16,
        "n_layer": 4,
        "n_head": 2,
        "mixer": {"kernel_sizes": 7, "expand_proj": 4},
        "alt_mixer": {"feature_dim": 3, "num_heads": 2},
        "alt_mixer_2": {"window_size": 8},
        "alt_mixer_layers": [1],
        "alt_mixer_2_layers": [3],
        "rms_norm": True,
        "activation_function": "swiglu",
        "rotary_emb_fraction": 1,
        "pad_vocab_size_multiple": 8,
    } | changes


# The mechanism


@torch.no_grad()
def test_two_tokens_of_one_feature_by_hand():
    mixer = TaylorLinearAttention(1, num_heads=1, feature_dim=1)
    for projection, value in ((mixer.proj_q, 2.0), (mixer.proj_k, 1.0), (mixer.proj_v, 1.0), (mixer.out_proj, 1.0)):
        projection.weight.fill_(value)
    out, state = mixer(torch.tensor([[[1.0], [3.0]]]))
    # the second query is 6, the keys are 1 and 3: 1 + 6 + 18 = 25 and 1 + 18 + 162 = 181
    assert_close(out, torch.tensor([[[1.0], [(25 * 1.0 + 181 * 3.0) / (25 + 181)]]]))
    # features 1, k, k^2 / sqrt(2): of keys 1 and 3, and of those times the values 1 and 3
    assert_close(state.k[0, 0], torch.tensor([2.0, 4.0, 10 / math.sqrt(2)]))
    assert_close(state.kv[0, 0, :, 0], torch.tensor([4.0, 10.0, 28 / math.sqrt(2)]))


@torch.no_grad()
def test_small_scores_give_the_weights_of_softmax():
    torch.manual_seed(0)
    mixer = TaylorLinearAttention(8, num_heads=1, feature_dim=4)
    x = torch.randn(1, 6, 8) * 0.3
    q, k, v = mixer.proj_q(x), mixer.proj_k(x), mixer.proj_v(x)
    softmax = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(mixer(x)[0], mixer.out_proj(softmax), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_parallel_chunked_and_recurrent_forms_agree(chunk):
    torch.manual_seed(0)
    parallel = TaylorLinearAttention(12, num_heads=3, feature_dim=5, chunk=1000)
    other = TaylorLinearAttention(12, num_heads=3, feature_dim=5, chunk=chunk)
    other.load_state_dict(parallel.state_dict())
    x = torch.randn(2, 100, 12)
    assert_close(other(x), parallel(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_convolution_of_three_tokens_by_hand():
    mixer = BaseConv(1, expansion=1)
    mixer.in_proj.weight.copy_(torch.tensor([[1.0], [2.0]]))
    mixer.in_proj.bias.copy_(torch.tensor([0.0, 1.0]))
    mixer.conv.conv.weight.copy_(torch.tensor([[[0.5, 1.0, 2.0]]]))
    mixer.out_proj.weight.fill_(1.0)
    mixer.out_proj.bias.fill_(0.0)
    out, state = mixer(torch.tensor([[[1.0], [2.0], [3.0]]]))
    convolved = torch.tensor([2.0, 1 + 4.0, 0.5 + 2 + 6.0])
    gate = torch.tensor([3.0, 5.0, 7.0])
    assert_close(out[0, :, 0], F.silu(convolved) * gate)
    assert state.inputs[0, :, 0].tolist() == [2.0, 3.0]


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "window"), [(5, 2), (300, 16), (260, 200), (40, 100)])
def test_a_window_is_softmax_over_the_token_and_those_before_it(tokens, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, tokens, 4)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance <= window))
    assert_close(windowed_attention(q, k, v, window, torch.zeros(1, dtype=torch.int64)), expected)


@torch.no_grad()
def test_a_window_tells_near_from_far_by_rotation_only():
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8)
    swapped = x[:, [1, 0, 2, 3, 4]]
    plain = SlidingWindowAttention(8, num_heads=2, window=8, rotary_base=None)
    rotated = SlidingWindowAttention(8, num_heads=2, window=8)
    assert_close(plain(x)[0][:, -1], plain(swapped)[0][:, -1])
    assert not torch.allclose(rotated(x)[0][:, -1], rotated(swapped)[0][:, -1], atol=1e-4)


# The model


def test_published_sizes():
    counts = {}
    for name in ("based-360m", "based-1b", "tiny"):
        with torch.device("meta"):
            counts[name] = sum(parameter.numel() for parameter in Based(Based.published[name]).parameters())
    assert counts == {"based-360m": 362_620_928, "based-1b": 1_349_453_056, "tiny": 290_752}
    windows = {name: config.window for name, config in Based.published.items()}
    assert windows == {"based-360m": 128, "based-1b": 128, "based-1b-50b": 128, "example-360m": 64, "tiny": 16}
    places = {
        "based-360m": ([1, 6, 11, 16, 21], [2, 7, 12, 17, 22]),
        "based-1b": ([1, 6, 11, 16, 21, 27, 33], [2, 7, 12, 17, 22, 28, 34]),
    }
    for name, (linear, window) in places.items():
        layers = Based.published[name].layers
        assert [n for n, kind in enumerate(layers) if kind == "linear"] == linear
        assert [n for n, kind in enumerate(layers) if kind == "window"] == window
    assert len(Based.published["based-360m"].layers) == 27 and len(Based.published["based-1b"].layers) == 36


def test_the_state_has_the_numbers_of_the_formula_after_any_length():
    config = Based.published["example-360m"]
    sizes = {"dim": config.dim, "num_heads": config.num_heads}
    linear = TaylorLinearAttention(**sizes, feature_dim=config.feature_dim).initial(1)
    window = SlidingWindowAttention(**sizes, window=config.window).initial(1)
    assert tree_bytes(linear) == 4 * 283_920  # 16 * 273 * 65
    assert tree_bytes(window) == 4 * 131_072 + 8  # 2 * 64 * 1,024, and the position
    assert tree_bytes(BaseConv(config.dim).initial(1)) == 4 * 2 * 2 * config.dim
    model = small()
    with torch.no_grad():
        held = {model.state_bytes(model(text(1, n))[1]) for n in (0, 1, 20, 200)}
    assert held == {model.state_bytes()} == {4 * (2 * 2 * 2 * 16 + 2 * 13 * 9 + 2 * 4 * 16) + 8}


@torch.no_grad()
def test_decoding_goes_on_where_the_prompt_ended():
    model, tokens = small(), text()
    whole, _ = model(tokens)
    _, state = model(tokens[:, :15])
    for position in range(15, 20):
        logits, state = model.step(tokens[:, position], state)
        assert_close(logits, whole[:, position], atol=1e-4, rtol=1e-4)
    made = torch.stack(list(model.generate(tokens, 6)), dim=1)
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, tokens[:, 20:])


def test_weights_start_as_the_authors_draw_them():
    torch.manual_seed(0)
    model = Based(replace(SMALL, dim=256, num_heads=4))
    for layer in model.layers:
        for name, part in layer.named_modules():
            if isinstance(part, torch.nn.Linear):
                smaller = math.sqrt(2 * 4) if name.endswith(("out_proj", "fc2")) else 1.0
                assert part.weight.std().item() == pytest.approx(0.02 / smaller, rel=0.1)
                assert part.bias is None or not part.bias.any()
    assert model.head.weight is model.embedding.weight


def test_a_few_steps_of_the_recipe_lower_the_loss():
    recipe = Recipe(steps=30, warmup=5, lr=1e-2)
    torch.manual_seed(0)
    model, tokens, losses = Based(SMALL), text(4, 16), []
    optimizer, schedule = recipe.optimizer(model)
    for _ in range(recipe.steps):
        loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_recipe_is_the_published_one():
    recipe = Recipe()
    assert [recipe.learning_rate(step) for step in (0, 200, 20_000)] == pytest.approx([1e-6, 8e-4, 8e-5])
    assert recipe.learning_rate(10_100) == pytest.approx((8e-4 + 8e-5) / 2)
    model = small()
    decayed, kept = recipe.parameter_groups(model)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    free = {names[id(p)] for p in kept["params"]}
    assert free == {name for name in names.values() if "norm" in name or "bias" in name or name == "embedding.weight"}


def test_saving_and_loading_changes_nothing(tmp_path):
    model = small(conv_bias=True, eps=1e-6)
    model.save_pretrained(tmp_path)
    again = Based.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again(text())[0], model(text())[0])
    assert again.head.weight is again.embedding.weight


@torch.no_grad()
def test_half_precision_and_autocast_are_close():
    model = small()
    expected, _ = model(text())
    half, state = small().bfloat16()(text())
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = model(text())
    for logits in (half, cast):
        assert logits.isfinite().all() and logits.dtype == torch.bfloat16
        assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert state[1].kv.dtype == torch.float32 and state[3].k.dtype == torch.bfloat16


# The authors' checkpoints


def test_official_names_become_ours(tmp_path):
    model = small()
    theirs = official(model)
    assert "transformer.layers.0.mixer.conv.conv.weight" in theirs
    beside = {
        "transformer.layers.3.mixer.rotary_emb.inv_freq": torch.ones(4),
        "transformer.decay.decay": torch.ones(2),
        "train_metrics.num-tokens.count": torch.ones(()),
    }
    for source in (theirs, theirs | beside, {f"model.{name}": tensor for name, tensor in theirs.items()}):
        assert torch.equal(Based.from_official(source, SMALL)(text())[0], model(text())[0])
    del theirs["lm_head.weight"]  # some files leave out what is tied
    assert torch.equal(Based.from_official(theirs, SMALL)(text())[0], model(text())[0])
    assert weights.official_layout(theirs) == SMALL.layout

    theirs = official(model)
    save_file(theirs, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(official_json()))
    assert torch.equal(Based.from_official(tmp_path)(text())[0], model(text())[0])
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    assert torch.equal(Based.from_official(tmp_path / "pytorch_model.bin")(text())[0], model(text())[0])


def test_a_bias_of_the_convolution_is_read_off_the_checkpoint():
    model = small(conv_bias=True)
    loaded = Based.from_official(official(model), SMALL)
    assert loaded.config.conv_bias and torch.equal(loaded(text())[0], model(text())[0])


def test_the_authors_config_is_read():
    assert weights.official_config(official_json()) == SMALL  # a window of 8 there is 4 here; kernel_sizes is unused
    fused = official_json(alt_mixer={"feature_dim": 3, "num_heads": 2, "parallel_implementation": "fla_parallel"})
    assert weights.official_config(fused) == replace(SMALL, eps=1e-6)


def test_without_a_config_the_published_one_of_that_width_and_layout_is_taken():
    model = Based(Based.published["tiny"])
    assert Based.from_official(official(model)).config == model.config


def message_of(source, config=SMALL) -> str:
    with pytest.raises(ValueError) as caught:
        Based.from_official(source, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    theirs = official(small())
    assert message_of(theirs, None) == f"no published Based has dim 16 and the layout {SMALL.layout!r}: pass config"
    got = message_of(theirs, replace(SMALL, feature_dim=4))
    assert got.endswith("proj_q.weight must have shape (8, 16) by the configuration, got (6, 16) in the checkpoint")
    assert "no weight for layers.4.mixer_norm.weight" in message_of(
        theirs, replace(SMALL, layout=f"{SMALL.layout} conv")
    )
    got = message_of(theirs, replace(SMALL, layout="conv linear conv"))
    assert "layers.3." in got and "no place" in got
    assert "'transformer.wpe.weight' is no weight of a Based model" in message_of(
        {"transformer.wpe.weight": torch.ones(1)}
    )
    assert "must be a checkpoint or a folder with" in message_of(tmp_path / "nothing")
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    assert "is not a readable checkpoint" in message_of(tmp_path)
    torch.save([1, 2], tmp_path / "list.bin")
    assert message_of(tmp_path / "list.bin").endswith("must hold tensors by name, got a list")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alt_mixer": None}, "config.json does not describe a Based model"),
        ({"rms_norm": False}, "config.json must have rms_norm True or leave it out, got False"),
        ({"rotary_emb_fraction": 0.5}, "config.json must have rotary_emb_fraction 1 or leave it out, got 0.5"),
        ({"n_head": 4}, r"config.json must give window and linear attention the same heads, got \[2, 4\]"),
        ({"n_embd": 15}, "dim must be divisible by num_heads, got dim 15 and num_heads 2"),
    ],
)
def test_configs_of_other_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        weights.official_config(official_json(**changes))


def test_a_broken_config_json_is_named(tmp_path):
    save_file(official(small()), tmp_path / "model.safetensors")
    for content, message in (("{", "is not readable JSON"), ("[]", "must hold one JSON object, got a list")):
        (tmp_path / "config.json").write_text(content)
        assert message in message_of(tmp_path, None)


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layout="conv mamba"), "layout must be made of conv, linear and window, got 'mamba'"),
        (dict(window=0), "window must be at least 1, got 0"),
        (dict(feature_dim=0), "feature_dim must be at least 1, got 0"),
        (dict(num_heads=3), "dim must be divisible by num_heads, got dim 16 and num_heads 3"),
        (dict(eps=0.0), "eps must be positive, got 0.0"),
    ],
)
def test_a_config_checks_itself(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaylorLinearAttention(10, num_heads=3), "dim must be a positive multiple of num_heads"),
        (lambda: TaylorLinearAttention(8, num_heads=2, feature_dim=0), "dim must be at least 1, got 0"),
        (
            lambda: TaylorLinearAttention(8, num_heads=2, chunk=0)(torch.ones(1, 1, 8)),
            "chunk must be at least 1, got 0",
        ),
        (lambda: SlidingWindowAttention(8, num_heads=2, window=0), "window must be at least 1, got 0"),
        (lambda: SlidingWindowAttention(6, num_heads=2), "rotary positions need an even dim per head, got 3"),
        (lambda: BaseConv(8, kernel=0), "dim and kernel must be at least 1, got dim 16 and kernel 0"),
        (lambda: Recipe(steps=10, warmup=10), r"warmup must be in \[0, steps\), got warmup 10 and steps 10"),
    ],
)
def test_sizes_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_of_other_sizes_is_refused():
    mixer = TaylorLinearAttention(8, num_heads=2, feature_dim=3)
    with pytest.raises(ValueError, match="the state must have kv of"):
        mixer(torch.ones(2, 1, 8), mixer.initial(3))


# The claims


def test_the_compared_models_differ_in_the_mixer_only():
    sizes = {name: claim.RecallModel(layout).state_numbers() for name, layout in claim.LAYOUTS.items()}
    assert sizes["based_8"] == 73 * 65 and sizes["window_37"] == 2 * 37 * 64
    assert sizes["attention"] == 2 * claim.LENGTH * claim.DIM and sizes["conv"] == 2 * claim.DIM
    assert sizes["hybrid"] == sizes["based_8"] + sizes["window_16"]
    assert list(claim.RATE) == list(claim.LAYOUTS) and set(claim.RATE.values()) <= set(claim.RATES)
    for layout in claim.LAYOUTS.values():
        model = claim.RecallModel(layout)
        assert isinstance(model.layers[0].mixer, claim.GatedConvolution) and model.layers[0].feedforward is None


@torch.no_grad()
def test_answers_are_the_logits_where_they_are_asked_for():
    torch.manual_seed(0)
    model = claim.RecallModel("conv linear_4")
    tokens, labels = claim.test_batches(0)[4]
    asked = labels[:3] != claim.IGNORED
    assert_close(model.answers(tokens[:3], asked), model(tokens[:3])[0][asked])


def test_training_and_test_sequences_are_drawn_apart():
    streams = []
    for seed in (0, 1, 2, claim.TUNING_SEED):
        streams.append(next(claim.training_batches(1, torch.Generator().manual_seed(2 * seed)))[0])
        streams.append(claim.test_batches(seed)[4][0])
    rows = {tuple(row.tolist()) for stream in streams for row in stream}
    assert len(rows) == 4 * (claim.BATCH + claim.TESTED)


def test_tuning_tries_every_rate_for_every_model(tmp_path, monkeypatch):
    run = Run(seed=0, workdir=tmp_path)
    monkeypatch.setattr(claim, "LAYOUTS", {"conv": "conv conv"})
    monkeypatch.setattr(claim, "TESTED", 4)
    shares = claim.tune(run, steps=2)
    assert list(shares) == ["conv"] and list(shares["conv"]) == [1e-3, 3e-3, 1e-2]


def test_training_moves_the_weights_and_depends_on_the_seed_only(tmp_path):
    def trained(steps: int, seed: int) -> torch.Tensor:
        return claim.train("conv conv", 1e-2, seed, Run(seed=seed, workdir=tmp_path), steps).embedding.weight

    assert torch.equal(trained(2, seed=3), trained(2, seed=3))
    assert not torch.equal(trained(2, seed=3), trained(2, seed=4))
    assert not torch.equal(trained(1, seed=3), trained(2, seed=3))


RECALL = {
    **{f"attention_at_{pairs}": 0.99 for pairs in (4, 8, 16)},
    **{"based_4_at_16": 0.5, "based_8_at_16": 0.8, "based_16_at_16": 0.95, "conv_at_16": 0.0},
    **{"window_8_at_8": 0.1, "window_8_at_16": 0.0, "window_16_at_16": 0.1, "window_32_at_16": 0.4},
    "window_37_at_16": 0.5,
}


@pytest.mark.parametrize(
    "worse",
    [
        {"attention_at_8": 0.97},
        {"based_8_at_16": 0.48, "window_37_at_16": 0.0},
        {"based_16_at_16": 0.78, "attention_at_16": 0.98},
        {"based_16_at_16": 0.88},
        {"window_8_at_8": 0.5},
        {"window_16_at_16": 0.6},
        {"window_37_at_16": 0.61},
    ],
    ids=str,
)
def test_every_part_of_the_rule_can_fail(worse):
    assert claim.recall_is_bought_with_state([RECALL, RECALL])
    assert not claim.recall_is_bought_with_state([RECALL | worse])


def test_the_hybrid_is_held_against_its_better_part():
    good = {"hybrid_at_16": 0.8, "based_8_at_16": 0.805, "window_16_at_16": 0.1}
    assert claim.hybrid_is_no_worse([good, good])
    assert not claim.hybrid_is_no_worse([good, good | {"hybrid_at_16": 0.77}])
    assert not claim.hybrid_is_no_worse([good | {"window_16_at_16": 0.82}])


def test_the_claim_about_the_forms_can_fail():
    held = {f"{name}_bytes_vary": 0.0 for name in ("linear", "window", "conv")} | {"linear_bytes_at_1024": 1_135_680.0}
    good = held | {"chunked_off": 1e-6, "recurrent_off": 1e-6}
    assert claim.forms_agree([good])
    for worse in ({"recurrent_off": 2e-4}, {"conv_bytes_vary": 8.0}, {"linear_bytes_at_1024": 4.0}):
        assert not claim.forms_agree([good | worse])


def test_the_mixers_fit_any_language_model():
    parts = {"linear": lambda dim: TaylorLinearAttention(dim, num_heads=1, feature_dim=2), "conv": BaseConv}
    model = LanguageModel(LanguageModelConfig(vocab_size=7, dim=6, layout="linear conv"), parts)
    assert model(torch.zeros(1, 3, dtype=torch.int64))[0].shape == (1, 3, 7)
