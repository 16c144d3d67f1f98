"""The peak memory of converting an OpenFlamingo-9B-shaped checkpoint, over the size of its weights.

    python tests/measure_converting.py --layers 4          # about 1.6 B parameters, 3.2 GB of weights
    python tests/measure_converting.py --layers 32         # OpenFlamingo-9B: 16 GB of weights, 36 GB of disk

Writes an LM of the shape of LLaMA-7B (bfloat16), a ViT-L/14 and a checkpoint of resampler, gated blocks and embedding
(float32, as released) into a temporary folder, converts them by the command line in a process of its own, and prints
as JSON the peak resident memory of that process less what the bare imports take.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_mmgpt import MMGPTConfig, MMGPTForConditionalGeneration, MMGPTVisionConfig


VOCABULARY, ADDED, EVERY = 32_000, 3, 4
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": VOCABULARY}
VISION = "ViT-L-14-quickgelu"
CHILD = """
import resource
from modeling_mmgpt import converting_mmgpt
import open_clip, processing_mmgpt, transformers.models.llama.modeling_llama
bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
converting_mmgpt.main()
print(bare, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the shape of one on the meta device."""
    return torch.full(tensor.shape, 0.01, dtype=dtype)


def write_language_model(folder: Path, layers: int) -> AutoConfig:
    """Write an LM of the shape of LLaMA-7B, a shard a layer, and a tokenizer of as many words."""
    config = AutoConfig.for_model("llama", num_hidden_layers=layers, dtype="bfloat16", **LLAMA_7B)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    shards: dict[str, list[str]] = {}
    for name in weights:
        shards.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)
    folder.mkdir()
    words = Tokenizer(models.WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="1", eos_token="2").save_pretrained(folder)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    places = {}
    for number, names in enumerate(shards.values()):
        file = f"model-{number:05}.safetensors"
        save_file(
            {name: like(weights[name], torch.bfloat16) for name in names}, folder / file, metadata={"format": "pt"}
        )
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return config


def write_files(folder: Path, layers: int) -> None:
    """Write all that a conversion reads."""
    write_checkpoint(folder, write_language_model(folder / "lm", layers))


def write_checkpoint(folder: Path, text_config: AutoConfig) -> None:
    """Write `checkpoint.pt` and the tower, by the names of OpenFlamingo."""
    text_config.vocab_size += ADDED
    config = MMGPTConfig(
        vision_config=MMGPTVisionConfig.from_open_clip(VISION),
        text_config=text_config,
        cross_attn_every_n_layers=EVERY,
    )
    with torch.device("meta"):
        weights = MMGPTForConditionalGeneration(config).state_dict()
    trained, tower = {}, {}
    for name, tensor in weights.items():
        if name.startswith("model.vision_tower."):
            tower[name.replace("model.vision_tower.", "visual.")] = like(tensor, torch.float32)
        elif name.startswith("model.resampler.") or "gated_cross_attn_layer" in name or "embed_tokens" in name:
            old = name.replace("model.resampler.", "perceiver.").replace("model.text_model.", "lang_encoder.")
            trained[old] = like(tensor, torch.float32)
    torch.save(trained, folder / "checkpoint.pt")
    save_file(tower, folder / "vision.safetensors")


def peak(*arguments: str | Path) -> tuple[int, int]:
    """Peak resident memory in bytes, after the imports and in the end, of a process that converts."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    bare, highest = done.stdout.split()[-2:]
    return int(bare) * 1024, int(highest) * 1024  # Linux counts in KiB


def measure(layers: int, folder: str | Path | None = None) -> dict[str, float]:
    """Make the files in a temporary folder inside `folder`, convert them, and compare.

    Returns:
        Sizes in bytes, `weights` of what was written and `peak` above the bare imports, and their `ratio`.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        folder = Path(name)
        # Elsewhere, for `ru_maxrss` of a process begins with the size of the one that started it.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            executor.submit(write_files, folder, layers).result()
        bare, highest = peak(
            *("flamingo", folder / "checkpoint.pt", folder / "lm", folder / "out"),
            *("--cross_attn_every_n_layers", EVERY, "--media_attention", "following"),
            *("--vision_tower", folder / "vision.safetensors", "--vision_config", VISION),
        )
        shards = [path.stat().st_size for path in (folder / "out").glob("*.safetensors")]
    return {
        "layers": layers,
        "weights": sum(shards),
        "shards": len(shards),
        "bare": bare,
        "peak": highest - bare,
        "ratio": round((highest - bare) / sum(shards), 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="of the LM; LLaMA-7B has 32")
    parser.add_argument("--folder", help="where to put the temporary files")
    args = parser.parse_args()
    print(json.dumps(measure(args.layers, args.folder), indent=1))


if __name__ == "__main__":
    main()
