"""Policies side by side on a small random model: what is measured, kept and refused."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.cli import main
from regard.evidence import llm_measurements
from regard.evidence.llm_bench import LLMBench, bench_llm, find_policies, front, results_of, rows_of
from regard.llm.longcontext import TASKS
from regard.paper import Run

CONTEXT = 1200
TOKEN = 2 * 2 * 2 * 8 * 4
"""Bytes of keys and values of one token: two layers of two heads of 8 channels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def small(folder: str, **options) -> LLMBench:
    return LLMBench(
        **dict(
            model=folder, only=("full", "streaming"), contexts=(CONTEXT,), budgets=(0.25,), prompts=1, continuation=4
        )
        | options
    )


def test_every_row_has_quality_bytes_and_time(folder, tmp_path):
    path = bench_llm(small(folder, budgets=(0.25, 0.5)), Run(seed=0, workdir=tmp_path))
    full, quarter, half = rows_of(path)
    assert [row["budget"] for row in (full, quarter, half)] == [CONTEXT, CONTEXT // 4, CONTEXT // 2]
    assert quarter["kv_mib"] == pytest.approx(CONTEXT / 4 * TOKEN / 2**20, abs=0.01)
    assert full["kv_mib"] > 3.9 * quarter["kv_mib"]
    for row in (full, quarter, half):
        assert abs(row["text_loss"] - math.log(259)) < 1 and row["decode_ms"] > 0 and row["prefill_s"] > 0
        assert 0 <= row["ruler"] <= 1 and 0 <= row["passkey_accuracy"] <= 1 and row["passkey_loss"] > 0
    assert set(results_of(path)[0].tasks) == set(TASKS)
    assert (tmp_path / "figures" / "llm.png").stat().st_size > 10_000


def test_what_is_finished_is_not_measured_again(folder, tmp_path, monkeypatch):
    measured = []
    measure = llm_measurements.measure
    monkeypatch.setattr(llm_measurements, "measure", lambda *a: measured.append(a[-1]) or measure(*a))

    def measured_by(**options):
        measured.clear()
        bench_llm(small(folder, **options), Run(seed=0, workdir=tmp_path))
        return list(measured)

    assert measured_by(only=("streaming",)) == ["streaming 1200 300"]
    assert measured_by() == ["full 1200 1200"]
    assert [row["policy"] for row in rows_of(tmp_path / "llm.json")] == ["full", "streaming"]
    assert measured_by(only=("streaming",), budgets=(0.25, 0.5)) == ["streaming 1200 600"]
    assert measured_by(only=("streaming",), kv_bits=8) == ["streaming 1200 300"]
    assert results_of(tmp_path / "llm.json")[0].kv_bytes == CONTEXT // 4 * TOKEN // 2  # 8 bytes and a scale, not 32


def test_a_policy_that_does_not_fit_is_left_out_or_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"gates are for 30 layers x 3 KV heads, the model has 2 x 2"):
        bench_llm(small(folder, only=("duo_attention",)), Run(seed=0, workdir=tmp_path))
    assert "duo_attention" in find_policies()
    with pytest.raises(ValueError, match=r"no policy 'streamin'; did you mean 'streaming'\?"):
        find_policies(["streamin"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budgets": (1.5,)}, r"shares of the context, above 0 and up to 1, got \(1.5,\)"),
        ({"budgets": (0.0,)}, "shares of the context"),
        ({"budgets": ()}, "shares of the context"),
        ({"contexts": (20,)}, r"300 tokens or more, to hide all tasks, got \(20,\)"),
        ({"prompts": 0}, "prompts must be at least 1, got 0"),
        ({"continuation": 1}, "continuation must be at least 2 tokens, got 1"),
        ({"kv_bits": 2}, "kv_bits must be 8 or 4, got 2"),
    ],
)
def test_settings_that_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LLMBench(**options)


def test_a_context_beyond_the_model_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="leave room in the model's 2048 tokens, got 2047"):
        bench_llm(small(folder, contexts=(2047,)), Run(seed=0, workdir=tmp_path))


def test_the_front_is_what_nothing_beats():
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 3.5), (2.0, 2.0), (4.0, 1.5)]
    assert front(points) == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]


def test_the_verb_prints_rows_as_json(folder, tmp_path, capsys):
    words = f"bench llm --model {folder} --only streaming --contexts {CONTEXT} --budgets 0.25 --prompts 1 "
    assert main.main((words + f"--continuation 3 --workdir {tmp_path} --json").split()) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["policy"] == "streaming" and row["budget"] == 300
