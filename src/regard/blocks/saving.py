"""Saving to a folder or the Hub and loading again, where a model that does not fit is refused in one sentence."""

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file

WEIGHTS = "model.safetensors"


class Saved(PyTorchModelHubMixin):
    """`save_pretrained`, `push_to_hub` and `from_pretrained` for a module whose one argument is `config`."""

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", config: Any = None, **options: Any) -> Any:
        """The saved model, ready to be applied.

        Raises ValueError, naming the place, where its weights are another model's or are damaged.
        """
        if config is None:
            raise FileNotFoundError(f"{model_id} holds no {cls.__name__}: config.json is missing")
        file = Path(model_id) / WEIGHTS
        if not file.parent.is_dir():
            download = ("revision", "cache_dir", "force_download", "token", "local_files_only")
            given: dict[str, Any] = {name: options[name] for name in download if name in options}
            file = Path(hf_hub_download(model_id, WEIGHTS, **given))
        if not file.is_file():
            raise FileNotFoundError(f"{model_id} holds no {cls.__name__}: {WEIGHTS} is missing")
        try:
            weights = load_file(file, device=map_location)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        model: Any = cls(config)
        own = model.state_dict(keep_vars=True)
        for name, variable in own.items():  # tied weights are saved once
            if name not in weights and (twin := next((n for n in weights if own.get(n) is variable), None)):
                weights[name] = weights[twin]
        wanted, found = ({name: tuple(each.shape) for name, each in of.items()} for of in (own, weights))
        different = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        if different:
            name = different[0]
            raise ValueError(
                f"{file} is not of this {cls.__name__}: {name} must be {wanted.get(name, 'absent')}, "
                f"got {found.get(name, 'none')}"
            )
        for name, variable in own.items():
            # as saved, dtype included; in the file's own memory, less aligned, products would round differently
            variable.data = weights[name].clone()
        return model.to(map_location).eval()
