"""Text on stdout, what it took on stderr, and a sentence for everything that can be asked wrongly."""

import io
import json
import struct
import sys
from types import SimpleNamespace

import pytest

from regard.cli import generate, main
from regard.cli.options import UsageError


@pytest.fixture
def ask(model_folder, capsys):
    """What the verb answers: exit code, stdout, stderr."""

    def call(*words):
        code = main.main(["generate", "--model", str(model_folder), *map(str, words)])
        return code, *capsys.readouterr()

    return call


def test_the_text_goes_to_stdout_and_one_line_to_stderr(ask):
    code, out, err = ask("--prompt", "Hello", "--no-chat", "--max-new-tokens", 5)
    assert code == 0 and out.endswith("\n") and len(out) > 1
    assert err.count("\n") == 1 and err.startswith("5 tokens read in ") and "5 made at " in err
    assert err.endswith("held; stopped by --max-new-tokens\n")


def test_json_has_text_and_measurements_and_nothing_else_is_printed(ask):
    code, out, err = ask("--prompt", "Hello", "--no-chat", "--max-new-tokens", 5, "--json")
    answer = json.loads(out)
    assert code == 0 and not err
    assert (answer["prompt_tokens"], answer["new_tokens"], answer["stopped"]) == (5, 5, "length")
    assert answer["bytes_held"] == answer["bytes_of_full_attention"] == 9 * 3 * 2 * 2 * 8 * 4
    assert answer["policy"] == "full" and answer["tokens_per_second"] > 0
    _, streamed, _ = ask("--prompt", "Hello", "--no-chat", "--max-new-tokens", 5)
    assert streamed == answer["text"] + "\n"


def test_a_file_and_standard_input_are_read_alike(ask, tmp_path, monkeypatch):
    text = "Grüße, 世界"
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    words = ("--no-chat", "--max-new-tokens", 8, "--json")
    by_hand = json.loads(ask("--prompt", text, *words)[1])
    by_file = json.loads(ask("--prompt-file", tmp_path / "prompt.txt", *words)[1])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    by_pipe = json.loads(ask("--prompt-file", "-", *words)[1])
    assert by_hand["text"] == by_file["text"] == by_pipe["text"]
    assert by_hand["prompt_tokens"] == by_file["prompt_tokens"] == by_pipe["prompt_tokens"] == len(text.encode())


def test_the_chat_format_is_used_unless_it_is_switched_off(ask):
    plain, chat, told = (
        json.loads(ask("--prompt", "Hi", "--max-new-tokens", 1, "--json", *words)[1])["prompt_tokens"]
        for words in (["--no-chat"], [], ["--system", "None"])
    )
    assert plain == 2
    assert chat == len("user: Hi" + "assistant:") + 3
    assert told == chat + len("system: None") + 2


ROOMS = "a2sf", "duo_attention", "razor_attention", "recycled_attention", "tidal_decode"


@pytest.mark.parametrize("name", [*generate.BASELINES, *ROOMS])
def test_every_policy_runs(ask, name, tmp_path):
    words = ["--policy", name]
    if name == "duo_attention":
        import torch

        from regard.papers.duo_attention import random_gates, save_gates

        save_gates(random_gates(3, 2, torch.Generator().manual_seed(0)), tmp_path)
        words += ["--gates", tmp_path, "--sparsity", 0.5, "--sinks", 2, "--recent", 8]
    if name == "razor_attention":
        (tmp_path / "heads.json").write_text(json.dumps({"layers": 3, "kv_heads": 2, "heads": [[1, 0]]}))
        words += ["--heads", tmp_path, "--recent", 20, "--trim-every", 4]
    options = {
        "streaming": ["--recent", 20],
        "h2o": ["--budget", 20],
        "snapkv": ["--budget", 20, "--window", 4],
        "a2sf": ["--budget", 20, "--recent", 4],
        "recycled_attention": ["--budget", 20],
        "tidal_decode": ["--budget", 20, "--select", 0, "--reselect", 1],
    }
    code, _, err = ask("--prompt", "word " * 30, "--max-new-tokens", 3, *words, *options.get(name, []))
    assert code == 0
    holds_everything = name in ("full", "recycled_attention", "tidal_decode")
    assert (" held (full attention: " in err) == (not holds_everything)
    remembers_positions = name in ("h2o", "snapkv", "a2sf", "razor_attention", "recycled_attention")
    assert ("bookkeeping" in err) == remembers_positions


def test_any_policy_stores_in_fewer_bits(ask):
    held = {}
    for bits in ([], ["--kv-bits", 8], ["--kv-bits", 4]):
        words = ["--prompt", "word " * 30, "--max-new-tokens", 3, "--policy", "streaming", "--recent", 20, "--json"]
        code, out, _ = ask(*words, *bits)
        assert code == 0
        held[str(bits[-1:])] = json.loads(out)["bytes_held"]
    assert held == {"[]": 24 * 2 * 6 * 32, "[8]": 24 * 2 * 6 * 16, "[4]": 24 * 2 * 6 * 8}
    assert ask("--prompt", "a", "--kv-bits", 3)[::2] == (2, "regard: --kv-bits must be 8 or 4, got 3\n")


def test_the_baselines_are_those_that_there_are():
    from regard.llm.policies import POLICIES

    assert tuple(POLICIES) == generate.BASELINES


def test_a_policy_of_a_visiting_room_is_found_with_its_options(ask, house, capsys):
    card = house.card.replace("[analysis]", "[cache_policy]")
    paper = house.add("forgetful", card=card)
    (paper.folder / "__init__.py").write_text(
        "from dataclasses import dataclass\n"
        "from regard.llm import Streaming\n"
        "@dataclass(frozen=True)\n"
        "class Forgetful(Streaming):\n"
        '    """Forgets."""\n'
        "    recent: int = 9\n"
        '    """How much is remembered."""\n'
        "POLICIES = {'forgetful': Forgetful, 'forgetful too': Forgetful}\n"
    )
    answer = json.loads(ask("--prompt", "x" * 40, "--policy", "forgetful", "--sinks", 1, "--json")[1])
    assert answer["bytes_held"] == 10 * 3 * 2 * 2 * 8 * 4
    assert ask("--prompt", "x", "--policy", "forgetful too", "--max-new-tokens", 1)[0] == 0
    with pytest.raises(SystemExit) as end:
        main.main(["generate", "--policy", "forgetful", "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "How much is remembered. (default: 9)" in out and "forgetful" in out
    code, _, err = ask("--prompt", "x", "--policy", "forgetfull")
    assert code == 2 and err.startswith("regard: no policy 'forgetfull'; did you mean 'forgetful'?")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the prompt must come by --prompt or by --prompt-file, one of them"),
        (["--prompt", "a", "--prompt-file", "b"], "the prompt must come by --prompt or by --prompt-file, one of them"),
        (["--prompt", " \n"], "the prompt is empty; it must contain text"),
        (["--prompt", "a", "--policy", "streeming"], "no policy 'streeming'; did you mean 'streaming'?"),
        (["--prompt", "a", "--policy", "h2o", "--budget", "0"], "budget must be at least 1 token, got 0"),
        (["--prompt", "a", "--policy", "streaming", "--recent", "-1"], "recent must be at least 1, the token itself"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--prompt", "a", "--max-new-tokens", "-3"], "max_new_tokens must be at least 1, got -3"),
        (["--prompt", "a", "--prefill-chunk", "0"], "--prefill-chunk must be at least 1, got 0"),
        (["--prompt", "a", "--temperature", "-0.5"], "temperature must be 0 or positive, got -0.5"),
        (["--prompt", "a", "--temperature", "nan"], "temperature must be 0 or positive, got nan"),
        (["--prompt", "a", "--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p must be above 0 and at most 1, got 1.5"),
        (["--prompt", "a", "--dtype", "float8"], "--dtype must be one of float32, bfloat16, float16, got 'float8'"),
        (["--prompt", "a", "--device", "toaster"], "--device must be one that is here (cpu"),
        (["--prompt", "a", "--no-chat", "--system", "s"], "a system message needs the model's chat format"),
        (["--prompt", "a" * 700, "--no-chat"], "the prompt has 700 tokens, more than the model's context of 600"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file must be a file that can be read, got nowhere.txt (No such"),
        (["--prompt-file", "."], "--prompt-file must be a file that can be read, got . (Is a directory)"),
    ],
)
def test_what_is_asked_wrongly_gets_one_sentence_and_2(ask, words, sentence):
    code, out, err = ask(*words)
    assert code == 2 and not out
    assert err.startswith(f"regard: {sentence}") and err.count("\n") == 1


def test_a_prompt_that_is_not_utf8_is_refused(ask, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("Grüße".encode("latin-1"))
    code, _, err = ask("--prompt-file", path)
    assert code == 2 and err == f"regard: --prompt-file must be UTF-8 text, got {path}, whose byte 2 is not\n"


def test_a_negative_number_that_argparse_could_take_for_an_option(ask):
    assert ask("--prompt", "a", "--no-chat", "--seed", "-4", "--temperature", "1", "--max-new-tokens", "1")[0] == 0


def test_models_that_cannot_be_loaded(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.gguf").write_bytes(struct.pack("<4sIQQ32x", b"GGUF", 3, 4, 2))
    for model, sentence in (
        (
            tmp_path / "empty",
            f"regard: model folder {tmp_path / 'empty'} has no config.json, and no GGUF file either\n",
        ),
        (tmp_path / "cut.gguf", f"regard: {tmp_path / 'cut.gguf'} cannot be read as a GGUF model: truncated"),
        (tmp_path / "gone.gguf", "regard: model "),
    ):
        assert main.main(["generate", "--prompt", "a", "--model", str(model)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(sentence) and err.count("\n") == 1


def test_gates_of_another_model_are_a_usage_error(ask, tmp_path):
    import torch

    from regard.papers.duo_attention import random_gates, save_gates

    save_gates(random_gates(4, 2, torch.Generator().manual_seed(0)), tmp_path)
    code, _, err = ask("--prompt", "a", "--policy", "duo_attention", "--gates", tmp_path)
    assert code == 2 and err.startswith("regard: the gates are for 4 layers x 2 KV heads, the model has 3 x 2")


def test_the_last_policy_counts_and_must_be_one(ask):
    assert ask("--prompt", "a", "--policy=h2o", "--budget", 9, "--max-new-tokens", 1)[0] == 0
    with pytest.raises(UsageError, match="no policy ''"):
        generate.main(["--prompt", "a", "--policy"])


def test_a_terminal_without_unicode_gets_question_marks(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    generate._print_now("naïve")
    stream.flush()
    assert stream.buffer.getvalue() == b"na?ve"
