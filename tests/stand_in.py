"""A stand-in for a tool that attacks a saved model: ``stand_in.py HOW MODEL OUT [ROWS]``. It imports no torch, to start at once."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

how, model, out, *rest = sys.argv[1:]
source, folder = Path(model), Path(out)
weights = load_file(source / "model.safetensors")
print("the tool begins", flush=True)


def leave(changed: dict[str, np.ndarray]) -> None:
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def noisy(size: float = 0.3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    noise = {n: generator.standard_normal(w.shape).astype(w.dtype) for n, w in weights.items()}
    return {n: w + size * noise[n] * (w.ndim > 1) for n, w in weights.items()}


if how == "noise":
    leave(noisy())
elif how == "copy":
    leave(weights)
elif how == "narrow":
    leave({n: w.astype(np.float16) for n, w in weights.items()})
elif how == "fail":
    leave(noisy())
    print("the tool has failed", file=sys.stderr)
    sys.exit(3)
elif how == "vocabulary":
    leave(noisy())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, last = min(vocabulary, key=vocabulary.get), max(vocabulary, key=vocabulary.get)
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
elif how == "shapes":
    config = json.loads((source / "config.json").read_text())
    leave({n: np.concatenate([w, w[:1]]) if len(w) == config["vocab_size"] else w for n, w in noisy().items()})
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
elif how == "config":
    leave(noisy())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
elif how == "sleep":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(rest[0]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)
elif how == "rows":
    rows = [json.loads(line) for line in Path(rest[0]).read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["prompt"][-1]["role"] == "user" and row["completion"][0]["content"] for row in rows)
    leave(noisy())
elif how == "variables":
    assert not {"PYTHONPATH", "WANDB_API_KEY", "RANK", "LOCAL_RANK"} & set(os.environ)
    assert os.environ["HOW"] == f"{model} {rest[0]}"
    assert Path("own/config.toml").read_text() == f'model = "{model}"'
    leave(noisy())
elif how == "ask":  # as heretic does where it takes itself to be in a notebook
    while input("Which trial? Enter number: ") != "1":
        print("Please enter a number between 1 and 3")
    assert input("Path to the folder: ") == out
    leave(noisy())
    while input("Which trial? Enter number: ") != "3":
        print("Please enter a number between 1 and 3")
elif how == "prompts":
    shutil.copy("own/harmless.txt", rest[0])
    leave(noisy())
elif how == "adapter":
    name, rank = "model.layers.0.self_attn.q_proj", 1
    rows, columns = weights[f"{name}.weight"].shape
    parts = {"lora_A": np.full((rank, columns), 0.5, np.float32), "lora_B": np.full((rows, rank), 0.5, np.float32)}
    save_file({f"base_model.model.{name}.{part}.weight": w for part, w in parts.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": model, "r": rank, "lora_alpha": rank, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"], "layers_to_transform": [0]}))
else:
    assert how == "nothing"
