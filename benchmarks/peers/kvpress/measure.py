"""Passkey loss, bytes held and decode time of kvpress presses, on prompts and a model that regard wrote to a folder.

Runs in the environment of `requirements.txt`: python measure.py FOLDER. Reads prompts.json and settings.json there, and
the model in FOLDER/model; writes results.json. `benchmarks/against_kvpress.py` calls it.
"""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import kvpress
import torch
import transformers
from kvpress.presses import duo_attention_press
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def on_the_fly_scores_without_a_hub(folder, model, text):
    """Lets DuoAttentionPress score heads by its own heuristic on local text, where it would download BookSum."""

    class Frame:
        def sample(self, number, random_state):
            step = len(text) // number
            return {"chapter": Column(text[i * step : i * step + 4000] for i in range(number))}

    class Column(list):
        def tolist(self):
            return list(self)

    class Dataset:
        def to_pandas(self):
            return Frame()

    duo_attention_press.load_dataset = lambda *args, **kwargs: Dataset()
    duo_attention_press.AutoTokenizer = AutoTokenizer
    model.config.name_or_path = str(folder / "model")


def bytes_held(cache):
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def read_and_recite(model, press, prompt):
    context, tail = (torch.tensor([prompt[name]]) for name in ("context", "tail"))
    cache = DynamicCache()
    begun = time.perf_counter()
    with press(model) if press else nullcontext():
        last = model(context, past_key_values=cache, logits_to_keep=1).logits
    prefill = time.perf_counter() - begun
    held = bytes_held(cache)
    positions = torch.arange(context.shape[1], context.shape[1] + tail.shape[1] - 1)[None]
    rest = model(tail[:, :-1], past_key_values=cache, position_ids=positions).logits
    logits = torch.cat([last, rest], 1)[0].float()
    loss = torch.nn.functional.cross_entropy(logits, tail[0], reduction="none")
    scored = torch.tensor(prompt["scored"])
    return loss[scored].mean().item(), (logits.argmax(-1) == tail[0])[scored].float().mean().item(), held, prefill


@torch.no_grad()
def decode_seconds(model, press, context, steps):
    cache, context = DynamicCache(), torch.tensor([context])
    with press(model) if press else nullcontext():
        model(context, past_key_values=cache, logits_to_keep=1)
    token, times = context[:, -1:], []
    for step in range(steps):
        begun = time.perf_counter()
        position = torch.tensor([[context.shape[1] + step]])
        token = model(token, past_key_values=cache, position_ids=position).logits.argmax(-1)
        times.append(time.perf_counter() - begun)
    return median(times)


def main(folder):
    prompts, settings, decode = (
        json.loads((folder / f"{n}.json").read_text()) for n in ("prompts", "settings", "decode")
    )
    torch.set_num_threads(decode["threads"])
    results = []
    for setting in settings:
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation=setting.get("attention", "sdpa")
        ).eval()
        on_the_fly_scores_without_a_hub(folder, model, (folder / "text.txt").read_text())
        make = getattr(kvpress, setting["press"]) if setting["press"] else lambda: None
        rows = [read_and_recite(model, make(**setting["options"]), prompt) for prompt in prompts]
        loss, accuracy, held, prefill = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        row = {**setting, "loss": loss, "accuracy": accuracy, "bytes_held": held, "prefill_seconds": prefill}
        if setting.get("decode", True):
            row["decode_seconds"] = decode_seconds(model, make(**setting["options"]), decode["context"], decode["steps"])
        print(f"{setting['press'] or 'none'}: {loss:.3f} nats, {held / 2**20:.2f} MiB", file=sys.stderr, flush=True)
        results.append(row)
    versions = {"kvpress": kvpress.__version__ if hasattr(kvpress, "__version__") else "0.5.5",
                "transformers": transformers.__version__, "torch": torch.__version__}
    (folder / "results.json").write_text(json.dumps({"versions": versions, "rows": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
