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
        wanted, found = (
            {name: tuple(weight.shape) for name, weight in weights_of.items()}
            for weights_of in (model.state_dict(), weights)
        )
        different = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        if different:
            name = different[0]
            raise ValueError(
                f"{file} is not of this {cls.__name__}: {name} must be {wanted.get(name, 'absent')}, "
                f"got {found.get(name, 'none')}"
            )
        # `assign` keeps the saved dtype; in the file's own memory, less aligned, products would round differently
        model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
        return model.to(map_location).eval()
