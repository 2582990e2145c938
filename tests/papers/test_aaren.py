"""Aaren: one attention in several forms, a stack that streams, the four settings, and jobs on files of one's own."""

import csv
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from regard.attention.merge import Partial, merge
from regard.attention.scan import Running, associative_scan, prefix_attention
from regard.attention.tree import tree_bytes
from regard.blocks.saving import WEIGHTS
from regard.data.timeseries import load_series
from regard.paper import Run
from regard.papers.aaren import (
    EXAMPLES,
    Aaren,
    AarenAttention,
    AarenStack,
    DecisionModel,
    EventModel,
    EventModelConfig,
    Forecaster,
    ForecasterConfig,
    NextEvent,
    SeriesClassifierConfig,
    StackConfig,
    TransformerStack,
    published,
    read_in_blocks,
)
from regard.papers.aaren.claim import CLAIMS, LENGTHS, SCALES, naive_prefix_softmax, step_by_step
from regard.papers.aaren.jobs import JOBS, Evaluate, Predict, Train, load_classifier
from regard.papers.aaren.training import Trainer, Training, make_classifier

TINY = asdict(published["tiny"])
STACKS = [AarenStack, TransformerStack]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# One attention in several forms


def test_a_value_worked_out_by_hand():
    scores = torch.tensor([[[0.0, math.log(3.0), math.log(4.0)]]])
    values = torch.tensor([[[[8.0], [0.0], [4.0]]]])
    read, state = prefix_attention(scores, values)
    assert_close(read.flatten(), torch.tensor([8.0, 2.0, 3.0]))  # 8; (8 + 0) / 4; (8 + 0 + 16) / 8
    assert_close(state.top.exp(), torch.tensor([[4.0]]))
    assert_close(state.total, torch.tensor([[2.0]]))  # (1 + 3 + 4) / 4
    assert_close(state.weighted, torch.tensor([[[6.0]]]))  # (8 + 0 + 16) / 4


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("scale", SCALES)
def test_all_forms_are_one_function(length, scale):
    query = torch.randn(2, 3, 1, 8) * scale
    keys, values = torch.randn(2, 3, length, 8), torch.randn(2, 3, length, 8)
    scores = (query * keys).sum(-1) / math.sqrt(8)
    right = naive_prefix_softmax(scores.double(), values.double()).float()
    forms = [
        prefix_attention(scores, values)[0],
        associative_scan(merge, Partial(values, scores), dim=2).out,
        torch.cat(list(step_by_step(scores, values)), dim=2),
    ]
    for form in forms:
        assert_close(form, right, rtol=0, atol=1e-5)
    blocks = zip(keys.split(50, 2), values.split(50, 2), strict=True)
    assert_close(read_in_blocks(query, blocks).out, right[:, :, -1:], rtol=0, atol=1e-4)  # makes its own scores


def test_reading_nothing_in_blocks_is_refused():
    with pytest.raises(ValueError, match="at least one pair of keys and values, got none"):
        read_in_blocks(torch.randn(1, 1, 1, 4), [])


def test_the_module_is_attention_of_its_projected_query():
    mixer, x = AarenAttention(dim=8, num_heads=2), torch.randn(1, 5, 8)
    host = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    projections = [mixer.attn.q_proj, mixer.attn.k_proj, mixer.attn.v_proj]
    host.in_proj_weight.data = torch.cat([each.weight for each in projections])
    host.in_proj_bias.data = torch.cat([each.bias for each in projections])
    host.out_proj.load_state_dict(mixer.attn.out_proj.state_dict())
    out, _ = mixer(x)
    for token in range(5):
        seen = x[:, : token + 1]
        assert_close(out[:, token : token + 1], host(mixer.query.view(1, 1, -1), seen, seen)[0])


def test_the_query_and_w_q_learn():
    mixer = AarenAttention(dim=8)
    mixer(torch.randn(2, 6, 8))[0].square().sum().backward()
    for weight in (mixer.query, mixer.attn.q_proj.weight, mixer.attn.k_proj.weight):
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0


# The stack and its host


def test_published_parameter_counts():
    counts = [sum(p.numel() for p in stack(published["parameter_count"]).parameters()) for stack in STACKS]
    assert counts == [3_152_896, 3_152_384]


def test_parameter_names_and_loading_the_host():
    host, stack = TransformerStack(published["tiny"]), AarenStack(published["tiny"])
    names = {name.split(".", 2)[2] for name in stack.state_dict() if name.startswith("layers.1.")}
    projections = {f"attn.{each}_proj.{kind}" for each in ("q", "k", "v", "out") for kind in ("weight", "bias")}
    assert {"query"} | projections <= names and {"ff.0.weight", "ff.3.bias"} <= names
    missing, unexpected = stack.load_state_dict(host.state_dict(), strict=False)
    assert missing == ["layers.0.query", "layers.1.query"] and unexpected == []


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize(("norm", "positions"), [("pre", "none"), ("post", "sinusoid"), ("pre", "learned")])
def test_streaming_equals_the_whole(kind, norm, positions):
    stack = kind(replace(published["tiny"], norm=norm, positions=positions, dropout=0.5)).eval()
    x = torch.randn(2, 70, 32)
    whole, end = stack(x)
    parts, state = [], None
    for part in x.split([1, 40, 0, 1, 28], dim=1):
        out, state = stack(part, state)
        parts.append(out)
    assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert_close(state.layers, end.layers, rtol=1e-4, atol=1e-5)
    assert state.seen.tolist() == [70, 70]


def test_aarens_state_is_constant_and_the_hosts_grows():
    held = {}
    for kind in STACKS:
        stack = kind(published["tiny"]).eval()
        _, after_one = stack(torch.randn(1, 1, 32))
        _, after_many = stack(torch.randn(1, 99, 32), after_one)
        held[kind] = tree_bytes(after_one.layers), tree_bytes(after_many.layers)
    layers, dim, heads, token_bytes = 2, 32, 4, 4
    assert held[AarenStack] == (layers * (dim + 2 * heads) * token_bytes,) * 2
    assert held[TransformerStack] == (2 * layers * dim * token_bytes, 100 * 2 * layers * dim * token_bytes)


@pytest.mark.parametrize("kind", STACKS)
def test_padding_is_neutral(kind):
    stack = kind(published["tiny"]).eval()
    x, noise = torch.randn(2, 9, 32), 100 * torch.randn(2, 9, 32)
    mask = torch.tensor([[False, True, True, False, True, True, True, False, True], [True] * 9])
    padded = torch.where(mask[..., None], x, noise)
    out, state = stack(padded[:, :4], mask=mask[:, :4])
    rest, state = stack(padded[:, 4:], state, mask[:, 4:])
    out = torch.cat([out, rest], 1)
    assert_close(out[0, mask[0]], stack(x[:1, mask[0]])[0][0], rtol=1e-4, atol=1e-5)
    assert_close(out[1:], stack(x[1:])[0], rtol=1e-4, atol=1e-5)
    assert out.isfinite().all()


def test_aaren_reads_a_prefix_of_padding_alone_as_nothing():
    mixer = AarenAttention(dim=8)
    out, state = mixer(torch.randn(1, 3, 8), mask=torch.zeros(1, 3, dtype=torch.bool))
    assert_close(out, mixer.attn.out_proj.bias.expand_as(out))
    assert_close(state, Running.empty(1, 4, 2))


def test_the_weights_of_a_picture_are_those_that_are_read_with():
    stack = AarenStack(published["tiny"]).eval()
    x, mask = torch.randn(2, 6, 32), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    weights = stack.weights(x, mask)
    assert weights.shape == (2, 2, 4, 6)
    assert_close(weights.sum(-1), torch.ones(2, 2, 4))
    assert weights[:, 1, :, 4:].abs().max() == 0
    layer = stack.layers[0]
    normed = layer.norm_attn(x)
    read = (weights[0][:, :, None] @ layer.attn.heads(layer.attn.v_proj(normed))).transpose(1, 2).flatten(2)
    assert_close(layer.attn.out_proj(read)[:1], layer.attn(layer.query, normed, mask=mask)[0][:1, -1:])
    assert not layer.attn._forward_pre_hooks


@pytest.mark.parametrize("kind", STACKS)
def test_half_precision(kind):
    stack = kind(published["tiny"]).eval()
    x = torch.randn(1, 40, 32)
    right = stack(x)[0]
    out, state = stack.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16 and (out - right).abs().max() < 0.2
    if kind is AarenStack:
        assert {part.dtype for layer in state.layers for part in layer} == {torch.float32}
    one, _ = stack(x[:, :1].bfloat16(), state)
    assert one.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dim=30, num_heads=4), "dim must be a multiple of num_heads, got dim 30 and num_heads 4"),
        (dict(num_layers=0), "num_layers must be positive, got 0"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1\.0"),
    ],
)
def test_a_stack_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StackConfig(**options)


def test_learned_positions_run_out_with_a_message():
    stack = AarenStack(replace(published["tiny"], positions="learned", max_tokens=4))
    _, state = stack(torch.randn(1, 3, 32))
    with pytest.raises(ValueError, match="max_tokens of the learned positions is 4, got token 5"):
        stack(torch.randn(1, 2, 32), state)


# The four settings


def inputs(name):
    series, lengths = torch.randn(3, 7, 2), torch.tensor([7, 3, 5])
    gaps, marks = torch.rand(3, 6) + 0.1, torch.randint(3, (3, 6))
    mask = torch.arange(6) < torch.tensor([[6], [4], [2]])
    states, actions = torch.randn(3, 6, 3), torch.rand(3, 6, 2) * 2 - 1
    return {
        "SeriesClassifier": ((series, lengths), (torch.tensor([0, 1, 0]),)),
        "Forecaster": ((torch.randn(3, 9, 1),), (torch.randn(3, 4, 1),)),
        "EventModel": ((gaps, marks), (mask,)),
        "DecisionModel": ((torch.randn(3, 6), states, actions, torch.arange(6).expand(3, 6)), (mask,)),
    }[name]


SETTINGS = ["SeriesClassifier", "Forecaster", "EventModel", "DecisionModel"]


@pytest.mark.parametrize("attention", ["aaren", "transformer"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_few_steps_lower_the_loss(name, attention):
    kind = type(EXAMPLES[name]())
    model = kind(replace(EXAMPLES[name]().config, attention=attention))
    assert isinstance(model.stack, AarenStack if attention == "aaren" else TransformerStack)
    given, wanted = inputs(name)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.loss(*given, *wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.stack.parameters())


@pytest.mark.parametrize("name", [*SETTINGS, "AarenStack", "TransformerStack"])
def test_saving_and_loading_changes_nothing(name, tmp_path):
    model = EXAMPLES[name]().eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    given = inputs(name)[0] if name in SETTINGS else (torch.randn(1, 4, 32),)
    for ours, theirs in zip(again(*given), model(*given), strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)


def test_the_dtype_survives_saving(tmp_path):
    EXAMPLES["Forecaster"]().bfloat16().save_pretrained(tmp_path)
    assert Forecaster.from_pretrained(tmp_path).embed.weight.dtype == torch.bfloat16


def test_a_classifier_reads_no_padding_and_streams():
    model = EXAMPLES["SeriesClassifier"]().eval()
    (series, lengths), _ = inputs("SeriesClassifier")
    logits = model(series, lengths)
    assert_close(logits[1:2], model(series[1:2, :3], lengths[1:2]))
    parts, state = [], None
    for part in series.split([2, 1, 4], dim=1):
        each, state = model.read(part, state)
        parts.append(each)
    assert_close(torch.cat(parts, 1)[torch.arange(3), lengths - 1], logits)


def test_a_classifier_scales_its_input():
    model = EXAMPLES["SeriesClassifier"]().eval()
    (series, lengths), _ = inputs("SeriesClassifier")
    logits = model(series, lengths)
    model.mean.fill_(5.0)
    model.deviation.fill_(3.0)
    assert_close(model(3 * series + 5, lengths), logits, rtol=1e-4, atol=1e-5)


def test_a_forecast_follows_the_units_of_its_window():
    model, window = EXAMPLES["Forecaster"]().eval(), torch.randn(2, 9, 1)
    assert_close(model(100 + 10 * window), 100 + 10 * model(window), rtol=1e-4, atol=1e-2)


def test_events_stream_and_ignore_padding():
    model = EXAMPLES["EventModel"]().eval()
    (gaps, marks), (mask,) = inputs("EventModel")
    whole = model(gaps, marks)
    first, state = model.read(gaps[:, :2], marks[:, :2])
    rest, _ = model.read(gaps[:, 2:], marks[:, 2:], state)
    assert_close(tuple(torch.cat(pair, 1) for pair in zip(first, rest, strict=True)), tuple(whole))
    loss = model.loss(gaps, marks, mask)
    assert_close(model.loss(gaps.masked_fill(~mask, 0.0), marks.masked_fill(~mask, 1), mask), loss)
    with pytest.raises(ValueError, match="gaps between events must be positive, got 0"):
        model.loss(gaps.index_fill(1, torch.tensor([1]), 0.0), marks, mask)


def test_the_density_of_a_gap_sums_to_one():
    weights = torch.tensor([[[0.25, 0.75]]]).log()
    event = NextEvent(weights, torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.5, 0.2]]]), torch.zeros(1, 1, 1))
    gaps = torch.linspace(0.001, 30, 20_000)[None]
    density = event.log_density(gaps).exp()
    assert torch.trapezoid(density, gaps).item() == pytest.approx(1.0, abs=1e-3)


def test_a_policy_acts_step_by_step_as_it_was_trained():
    model = EXAMPLES["DecisionModel"]().eval()
    (returns, states, actions, steps), _ = inputs("DecisionModel")
    whole = model(returns, states, actions, steps)
    last, memory, acted = None, None, []
    for step in range(6):
        action, memory = model.act(returns[:, step], states[:, step], steps[:, step], last, memory)
        acted.append(action)
        last = actions[:, step]
    assert_close(torch.stack(acted, 1), whole)
    assert whole.abs().max() <= 1


def test_settings_refuse_sizes_that_cannot_be():
    for kind, options, message in [
        (SeriesClassifierConfig, dict(classes=("one",)), "classes two or more"),
        (SeriesClassifierConfig, dict(columns=("x", "y")), "columns must be as many as features, 1, got x, y"),
        (ForecasterConfig, dict(horizon=0), "horizon must be positive, got 1 and 0"),
        (EventModelConfig, dict(marks=0), "marks and components must be positive, got 0 and 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            kind(**TINY, **options)


# Checkpoints that do not fit


def test_another_models_checkpoint_is_refused(tmp_path):
    EXAMPLES["Forecaster"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not of this EventModel: embed\.bias must be absent, got \(32,\)"):
        EventModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not of this SeriesClassifier"):
        load_classifier(tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    EXAMPLES["DecisionModel"]().save_pretrained(tmp_path)
    weights = tmp_path / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged"):
        DecisionModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no DecisionModel: {WEIGHTS} is missing"):
        DecisionModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"dim": 32')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_classifier(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no model that training wrote: config\.json is missing"):
        load_classifier(tmp_path / "elsewhere")


# Jobs on files of one's own


def series_csv(path: Path, count=12, header="series,label,x,y", seed=0) -> Path:
    """Series of two classes, one rising and one falling in x, of different lengths; y is noise around 50."""
    generator = torch.Generator().manual_seed(seed)
    lines = [header]
    for series in range(count):
        label = ("up", "down")[series % 2]
        for step in range(4 + series % 3):
            x = step * (1 if label == "up" else -1)
            lines.append(f"s{series},{label},{x},{50 + torch.rand(1, generator=generator).item():.3f}")
    path.write_text("\n".join(lines) + "\n")
    return path


def small(data: Path, **options) -> Train:
    stack = StackConfig(dim=8, num_layers=1, num_heads=2, feedforward=16, positions="sinusoid")
    return Train(data=str(data), **{"stack": stack, "training": Training(epochs=12, batch=4), **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a trained model, and the file it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    training = Training(epochs=25, batch=4, learning_rate=1e-2)
    small(series_csv(folder / "train.csv"), training=training).run(Run(seed=0, workdir=folder))
    return folder


def test_training_writes_a_model_that_predicts(trained, tmp_path):
    assert (trained / "figures" / "learning_curve.png").exists()
    fresh = series_csv(tmp_path / "fresh.csv", count=7, seed=1)
    written = Predict(checkpoint=trained, input=fresh, batch=3).run(Run(seed=0, workdir=tmp_path / "out"))
    rows = list(csv.DictReader(written.open()))
    assert [row["series"] for row in rows] == [f"s{series}" for series in range(7)]
    assert [row["predicted"] for row in rows] == ["up", "down"] * 3 + ["up"]
    for row in rows:
        assert float(row["probability of up"]) + float(row["probability of down"]) == pytest.approx(1, abs=1e-5)
        assert (float(row["probability of up"]) > 0.5) == (row["predicted"] == "up")


def test_columns_in_another_order_predict_the_same(trained, tmp_path):
    fresh = series_csv(tmp_path / "fresh.csv", seed=1)
    rows = list(csv.DictReader(fresh.open()))
    with (tmp_path / "turned.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["y", "x", "series"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    written = [
        Predict(checkpoint=trained / "model", input=path).run(Run(seed=0, workdir=tmp_path / path.stem)).read_text()
        for path in (fresh, tmp_path / "turned.csv")
    ]
    assert written[0] == written[1]


def test_evaluation_counts_by_class(trained, tmp_path):
    fresh = series_csv(tmp_path / "fresh.csv", count=6, seed=2)
    fresh.write_text(fresh.read_text().replace("s5,down", "s5,up"))  # one label that is wrong
    written = Evaluate(checkpoint=trained, data=str(fresh)).run(Run(seed=0, workdir=tmp_path))
    measured = json.loads(written.read_text())
    assert measured["accuracy"] == pytest.approx(5 / 6) and measured["series"] == 6
    assert measured["recall of down"] == 1 and measured["recall of up"] == pytest.approx(3 / 4)
    confusion = list(csv.reader((tmp_path / "confusion.csv").open()))
    assert confusion == [["class", "predicted down", "predicted up"], ["down", "2", "0"], ["up", "1", "3"]]
    assert (tmp_path / "figures" / "confusion.png").exists()


class Killed(Exception):
    """In place of a signal."""


@pytest.mark.parametrize(("attention", "after"), [("aaren", 1), ("aaren", 5), ("transformer", 7)])
def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path, monkeypatch, attention, after):
    monkeypatch.setattr(Run, "figure", lambda run, name, figure: run.workdir)
    job = small(series_csv(tmp_path / "train.csv"), attention=attention, checkpoint_every=2)
    job = replace(job, training=Training(epochs=4, batch=4))  # 3 steps an epoch
    whole = job.run(Run(seed=3, workdir=tmp_path / "whole"))
    advance, taken = Trainer.advance, []

    def killed(self):
        if len(taken) == after:
            raise Killed
        taken.append(self.step)
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", killed)
        with pytest.raises(Killed):
            job.run(Run(seed=3, workdir=tmp_path / "killed"))
    torch.rand(17)  # the global generator is elsewhere in another process
    steps = []
    monkeypatch.setattr(Trainer, "advance", lambda self: (steps.append(self.step), advance(self)))
    resumed = job.run(Run(seed=3, workdir=tmp_path / "killed"))
    assert steps == list(range(after - after % 2, 12))
    assert_close(*(load_classifier(folder).state_dict() for folder in (whole, resumed)), rtol=0, atol=0)
    states = [torch.load(tmp_path / name / "training.pt", weights_only=True) for name in ("whole", "killed")]
    assert states[0]["history"] == states[1]["history"] and len(states[0]["history"]) == 4
    assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)


def test_the_kept_weights_are_those_of_the_best_epoch(tmp_path, monkeypatch):
    scores = iter([(0.5, 0.5), (0.4, 0.9), (0.3, 0.9), (0.1, 0.6)])
    monkeypatch.setattr("regard.papers.aaren.training.score", lambda model, series: training.Score(*next(scores)))
    from regard.papers.aaren import training

    seen = []
    end = Trainer._end_epoch

    def remembered(self):
        end(self)
        seen.append({name: weight.clone() for name, weight in self.model.state_dict().items()})

    monkeypatch.setattr(Trainer, "_end_epoch", remembered)
    job = small(series_csv(tmp_path / "train.csv"), training=Training(epochs=4, batch=4))
    kept = load_classifier(job.run(Run(seed=0, workdir=tmp_path))).state_dict()
    assert_close(kept, seen[2], rtol=0, atol=0)
    assert not torch.equal(kept["embed.weight"], seen[3]["embed.weight"])


def test_training_leaves_the_global_generator_alone(tmp_path):
    job = small(series_csv(tmp_path / "train.csv"), training=Training(epochs=1, batch=4))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    job.run(Run(seed=0, workdir=tmp_path))
    assert torch.equal(torch.rand(3), wanted)


def test_a_checkpoint_of_other_options_or_series_is_refused(tmp_path):
    data, run = series_csv(tmp_path / "train.csv"), Run(seed=0, workdir=tmp_path)
    training = Training(epochs=1, batch=4)
    small(data, training=training).run(run)
    with pytest.raises(ValueError, match=r"is of a training with learning_rate 0\.001, got 0\.01; go on with the same"):
        small(data, training=replace(training, learning_rate=0.01)).run(run)
    series_csv(data, seed=9)
    with pytest.raises(ValueError, match="is of a training with training series"):
        small(data, training=training).run(run)
    checkpoint = tmp_path / "training.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"training\.pt is not a checkpoint of this training"):
        small(data, training=training).run(run)


def test_a_validation_file_takes_the_place_of_held_out_series(tmp_path):
    data, validation = series_csv(tmp_path / "train.csv"), series_csv(tmp_path / "validation.csv", seed=1)
    job = small(data, validation=validation)
    assert [len(each) for each in job._sets(0)] == [12, 12]
    assert [len(each) for each in small(data)._sets(0)] == [10, 2]
    validation.write_text(validation.read_text().replace("s3,down", "s3,sideways"))
    with pytest.raises(ValueError, match=r"validation\.csv: labels must be out of down, up, got 'sideways'"):
        job.run(Run(seed=0, workdir=tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("label,", "kind,"), "column 'kind': a value must be a finite number, got 'up'"),
        (("series,", "name,"), "the column 'series' is missing"),
        (("s0,up,0,", "s0,up,nan,"), "line 2, column 'x': a value must be a finite number, got 'nan'"),
        (("s0,up,0,", "s0,up,much,"), "line 2, column 'x': a value must be a finite number, got 'much'"),
        (("down", "up"), "the series must be of two classes or more, got up"),
    ],
)
def test_files_that_cannot_be_learnt_from_are_named(tmp_path, change, message):
    data = series_csv(tmp_path / "train.csv")
    data.write_text(data.read_text().replace(*change))
    with pytest.raises(ValueError, match=message) as caught:
        small(data).run(Run(seed=0, workdir=tmp_path))
    assert str(data) in str(caught.value)


def test_data_that_is_neither_file_nor_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data must be a \.ts or \.csv file, or one of Italy.*'GunPint'"):
        Train(data="GunPint").run(Run(seed=0, workdir=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no series file absent\.csv"):
        Train(data="absent.csv").run(Run(seed=0, workdir=tmp_path))


def test_series_that_the_model_cannot_read_are_refused(trained, tmp_path):
    run = Run(seed=0, workdir=tmp_path)
    fresh = series_csv(tmp_path / "fresh.csv")
    fresh.write_text(fresh.read_text().replace("series,label,x,y", "series,label,x,z"))
    with pytest.raises(ValueError, match="the column 'y' is missing, the columns are series, label, x, z"):
        Predict(checkpoint=trained, input=fresh).run(run)
    (tmp_path / "wide.ts").write_text("@data\n1,2:3,4:5,6\n")
    with pytest.raises(ValueError, match=r"wide\.ts: the series must have 2 features, got 3"):
        Predict(checkpoint=trained, input=tmp_path / "wide.ts").run(run)
    (tmp_path / "bare.ts").write_text("@data\n1,2:3,4\n")
    with pytest.raises(ValueError, match=r"bare\.ts: the series must have labels"):
        Evaluate(checkpoint=trained, data=str(tmp_path / "bare.ts")).run(run)
    series_csv(fresh).write_text(fresh.read_text().replace("s3,down", "s3,sideways"))
    with pytest.raises(ValueError, match="labels must be out of down, up, got 'sideways'"):
        Evaluate(checkpoint=trained, data=str(fresh)).run(run)
    with pytest.raises(ValueError, match="ItalyPowerDemand has the classes 1, 2, the model down, up"):
        Evaluate(checkpoint=trained).run(run)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Train(validation_share=0.0), "validation_share must be between 0 and 1, got 0.0"),
        (lambda: Train(checkpoint_every=0), "checkpoint_every must be at least 1, got 0"),
        (lambda: Training(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: Training(learning_rate=-1.0), "learning_rate must be positive, got -1.0"),
        (lambda: Training(weight_decay=-1.0), "weight_decay must not be negative, got -1.0"),
        (lambda: Predict(checkpoint=Path("x"), input=Path("y"), batch=0), "batch must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_that_explodes_stops_the_training(tmp_path):
    train = load_series(series_csv(tmp_path / "train.csv"))
    model = make_classifier(SeriesClassifierConfig(**TINY, features=2, classes=train.classes), train, seed=0)
    trainer = Trainer(model, train, None, Training(batch=12, learning_rate=1e-3), seed=0)
    with torch.no_grad():
        model.embed.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"loss of epoch 1 is not finite: learning_rate must be lower, got 0\.001"):
        trainer.advance()


def test_the_jobs_are_the_verbs():
    assert {"train": Train, "predict": Predict, "eval": Evaluate} == JOBS


# The rules of the claims


def test_the_rules_can_fail():
    one, short, longer, accuracy, forecasts = CLAIMS
    assert one.holds([{"scan_off": 1e-6}]) and not one.holds([{"scan_off": 2e-5}])
    streamed = {
        "aaren_time_ratio": 1.0,
        "transformer_time_ratio": 2.5,
        "aaren_bytes_first": 576.0,
        "aaren_bytes_last": 576.0,
        "transformer_bytes_first": 1024.0,
        "transformer_bytes_last": 1024.0 * 4096,
    }
    assert short.holds([streamed]) and not longer.holds([streamed])
    for change in ({"aaren_time_ratio": 1.3}, {"transformer_time_ratio": 1.9}, {"aaren_bytes_last": 577.0}):
        assert not short.holds([streamed | change])
    reached = {"difference": -0.02, "aaren_ItalyPowerDemand": 0.9, "transformer_ItalyPowerDemand": 0.86}
    assert accuracy.holds([reached])
    for change in ({"difference": -0.04}, {"aaren_ItalyPowerDemand": 0.84}, {"transformer_ItalyPowerDemand": 0.84}):
        assert not accuracy.holds([reached | change])
    errors = {"aaren_mse": 1.05, "transformer_mse": 1.0, "window_mean_mse": 3.0}
    assert forecasts.holds([errors])
    assert not forecasts.holds([errors | {"aaren_mse": 1.2}]) and not forecasts.holds(
        [errors | {"window_mean_mse": 2.0}]
    )


def test_aaren_is_exported_beside_its_layer():
    attn = Aaren(8, 2)
    assert_close(attn(torch.zeros(8), torch.zeros(1, 3, 8))[0], attn.out_proj(attn.v_proj.bias).expand(1, 3, 8))
    with pytest.raises(ValueError, match="dim must be a positive multiple of num_heads, got dim 8 and num_heads 3"):
        Aaren(8, 3)
