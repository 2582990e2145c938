"""The authors' checkpoints -> our state dict."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from regard.papers.based.model import BasedConfig

RENAMES = (
    (r"transformer\.embeddings\.word_embeddings\.weight", "embedding.weight"),
    (r"transformer\.layers\.(\d+)\.norm1\.weight", r"layers.\1.mixer_norm.weight"),
    (r"transformer\.layers\.(\d+)\.norm2\.weight", r"layers.\1.feedforward_norm.weight"),
    (r"transformer\.layers\.(\d+)\.mixer\.Wqkv\.weight", r"layers.\1.mixer.qkv_proj.weight"),
    (r"transformer\.layers\.(\d+)\.mixer\.((?:in_proj|conv|proj_[qkv]|out_proj)\..+)", r"layers.\1.mixer.\2"),
    (r"transformer\.layers\.(\d+)\.mlp\.(fc[12]\.weight)", r"layers.\1.feedforward.\2"),
    (r"transformer\.ln_f\.weight", "norm.weight"),
    (r"lm_head\.weight", "head.weight"),
)
"""Their names, as patterns, and ours. The first half of their fc1 is the value and the second the gate, like ours."""

IGNORED = re.compile(r".*\.(rotary_emb|feature_map|decay)\.\w+|.*metrics.*")
"""What some of their checkpoints carry beside weights: tables that follow from the sizes, and counters of training.

The decay belongs to an option that the released forward pass does not use.
"""

FIXED = {"rms_norm": True, "activation_function": "swiglu", "rotary_emb_fraction": 1}
"""Options of their `config.json` that all released models have, and ours has no other way."""

MIXERS = {"conv.conv.weight": "conv", "proj_q.weight": "linear", "Wqkv.weight": "window"}
"""What a layer is, by a weight that only that kind of mixer has."""


def read_official(
    source: os.PathLike[str] | str | Mapping[str, Tensor],
    config: BasedConfig | None,
    published: Mapping[str, BasedConfig],
) -> tuple[dict[str, Tensor], BasedConfig]:
    """Our state dict and the configuration that fits it, out of what `Based.from_official` takes."""
    if isinstance(source, Mapping):
        official = dict(source)
    else:
        path = Path(source)
        official = _load(_checkpoint(path))
        described = (path if path.is_dir() else path.parent) / "config.json"
        if config is None and described.is_file():
            config = official_config(_read_json(described))
    if config is None:
        config = _published_like(official, published)
    weights = rename(official)
    if any(name.endswith(".mixer.conv.conv.bias") for name in weights):
        config = replace(config, conv_bias=True)
    return weights, config


def rename(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names. Raises ValueError on a name that no Based checkpoint has."""
    ours = {}
    for name, tensor in official.items():
        name = name.removeprefix("model.")
        if IGNORED.fullmatch(name):
            continue
        for pattern, new in RENAMES:
            if re.fullmatch(pattern, name):
                ours[re.sub(pattern, new, name)] = tensor
                break
        else:
            raise ValueError(
                f"{name!r} is no weight of a Based model, "
                "whose weights are named like 'transformer.layers.0.mixer.in_proj.weight'"
            )
    if "embedding.weight" in ours:
        ours.setdefault("head.weight", ours["embedding.weight"])
    return ours


def check_fit(weights: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the first that does not fit, unless names and shapes are those of the model."""
    for name, tensor in model.items():
        if name not in weights:
            raise ValueError(f"the checkpoint has no weight for {name}, which the configuration asks for")
        if weights[name].shape != tensor.shape:
            got, expected = tuple(weights[name].shape), tuple(tensor.shape)
            raise ValueError(f"{name} must have shape {expected} by the configuration, got {got} in the checkpoint")
    for name in weights:
        if name not in model:
            raise ValueError(f"the checkpoint has {name}, for which the configuration has no place")


def official_layout(official: Mapping[str, Tensor]) -> str:
    """The mixer of each layer, read off the names of its weights."""
    kinds = {}
    for name in official:
        found = re.fullmatch(r"(?:model\.)?transformer\.layers\.(\d+)\.mixer\.(.+)", name)
        if found and found[2] in MIXERS:
            kinds[int(found[1])] = MIXERS[found[2]]
    return " ".join(kinds[layer] for layer in sorted(kinds))


def official_config(described: Mapping[str, Any]) -> BasedConfig:
    """Our configuration, from the `config.json` of an official checkpoint.

    Raises ValueError where it does not describe a Based model, or one with options that no released model has.
    """
    for name, value in FIXED.items():
        if described.get(name, value) != value:
            raise ValueError(f"config.json must have {name} {value!r} or leave it out, got {described[name]!r}")
    try:
        linear, window = described["alt_mixer"], described["alt_mixer_2"]
        kinds = dict.fromkeys(described["alt_mixer_layers"], "linear")
        kinds |= dict.fromkeys(described["alt_mixer_2_layers"], "window")
        layers = described.get("n_layer", described.get("num_hidden_layers"))
        heads = {described.get("n_head", described.get("num_attention_heads", 16)), linear.get("num_heads", 16)}
        if len(heads) > 1:
            raise ValueError(f"config.json must give window and linear attention the same heads, got {sorted(heads)}")
        fused = str(linear.get("parallel_implementation", "")).startswith("fla")
        return BasedConfig(
            vocab_size=described["vocab_size"],
            dim=described.get("n_embd", described.get("hidden_size")),
            layout=" ".join(kinds.get(layer, "conv") for layer in range(layers)),
            vocab_multiple=described.get("pad_vocab_size_multiple", 8),
            tied=described.get("tie_word_embeddings", True),
            num_heads=heads.pop(),
            feature_dim=linear.get("feature_dim", 16),
            window=window["window_size"] // 2,  # their kernel is given half of it, all of it backwards
            kernel=described["mixer"].get("kernel_size", 3),  # "kernel_sizes", also found there, is never read
            eps=1e-6 if fused else linear.get("eps", 1e-12),
            norm_eps=described.get("layer_norm_epsilon", 1e-5),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json does not describe a Based model: {error!r}") from None


def _published_like(official: Mapping[str, Tensor], published: Mapping[str, BasedConfig]) -> BasedConfig:
    names = (f"{prefix}transformer.embeddings.word_embeddings.weight" for prefix in ("", "model."))
    embedding = next((official[name] for name in names if name in official), None)
    dim = None if embedding is None else embedding.shape[1]
    layout = official_layout(official)
    for config in published.values():
        if config.dim == dim and " ".join(config.layers) == layout:
            return config
    raise ValueError(f"no published Based has dim {dim} and the layout {layout!r}: pass config")


def _checkpoint(path: Path) -> Path:
    """The file with the weights."""
    if path.is_file():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} must be a checkpoint or a folder with model.safetensors or pytorch_model.bin")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(described, dict):
        raise ValueError(f"{path} must hold one JSON object, got a {type(described).__name__}")
    return described


def _load(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold tensors by name, got a {type(loaded).__name__}")
    return loaded
