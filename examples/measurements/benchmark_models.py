"""What the benchmarks measure and by which clock: ours and its peers at one shape, with random weights."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    StaticCache,
    set_seed,
)
from transformers.cache_utils import StaticLayer
from transformers.modeling_utils import local_torch_dtype

from modeling_mmgpt import MMGPTConfig, MMGPTForConditionalGeneration


@dataclass(frozen=True)
class Shape:
    """Sizes that all models of one run share."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    vision_width: int
    vision_layers: int
    patch: int
    side: int
    every: int

    @property
    def image_token(self) -> int:
        """Id of `<image>`."""
        return self.vocabulary - 2


# LLaMA-7B, ViT-L/14, a block before every 4th layer. Three tokens more than LLaMA's 32,000, filled up to a multiple of
# 64 (`fill_vocabulary`), in the peers as well.
OPEN_FLAMINGO_9B = Shape(4096, 32, 32, 11008, 32_064, 1024, 24, 14, 224, 4)
TINY_BASE = Shape(160, 4, 5, 448, 764, 128, 4, 8, 48, 1)  # the base of the tiny world
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


# The models


def llama(shape: Shape, layers: int, **more) -> dict:
    """Sizes of the LM, as all three configs name them."""
    return {
        "hidden_size": shape.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }


def build_mmgpt(shape: Shape) -> nn.Module:
    """Ours, its gates open."""
    vision = {"width": shape.vision_width, "layers": shape.vision_layers, "head_width": 64, "patch_size": shape.patch}
    model = MMGPTForConditionalGeneration(
        MMGPTConfig(
            vision_config={**vision, "image_size": shape.side, "quick_gelu": True},
            text_config=LlamaConfig(**llama(shape, shape.layers)),
            cross_attn_every_n_layers=shape.every,
            image_token_id=shape.image_token,
            end_of_chunk_token_id=shape.image_token - 1,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_gate", "ff_gate")):
            nn.init.constant_(parameter, 0.5)
    return model


def build_idefics(shape: Shape) -> nn.Module:
    """Flamingo by Hugging Face, with a resampler of 64 latents."""
    vision = {"embed_dim": shape.vision_width, "intermediate_size": 4 * shape.vision_width, "image_size": shape.side}
    vision |= {"patch_size": shape.patch, "num_hidden_layers": shape.vision_layers}
    config = IdeficsConfig(
        **llama(shape, shape.layers),
        additional_vocab_size=0,
        alpha_initializer="ones",
        cross_layer_interval=shape.every,
        use_resampler=True,
        vision_config={**vision, "num_attention_heads": shape.vision_width // 64},
        perceiver_config={"use_resampler": True, "resampler_n_latents": 64, "resampler_depth": 6}
        | {"resampler_n_heads": max(1, shape.vision_width // 128), "resampler_head_dim": 64},
    )
    return IdeficsForVisionText2Text(config)


def build_mllama(shape: Shape) -> nn.Module:
    """Llama 3.2 Vision, one tile, as many layers of cross-attention as we have blocks."""
    blocks = shape.layers // shape.every
    cross = [max(1, shape.every - 1) + k * (shape.every + 1) for k in range(blocks)]  # 3, 8, 13, ... as in Llama 3.2
    vision = {
        "hidden_size": shape.vision_width,
        "intermediate_size": 4 * shape.vision_width,
        "patch_size": shape.patch,
    }
    vision |= {"attention_heads": shape.vision_width // 64, "num_hidden_layers": shape.vision_layers}
    vision |= {"num_global_layers": 1, "image_size": shape.side, "max_num_tiles": 1}
    vision |= {"vision_output_dim": 2 * shape.vision_width, "intermediate_layers_indices": [shape.vision_layers - 1]}
    text = llama(shape, shape.layers + blocks, num_key_value_heads=shape.heads, cross_attention_layers=cross)
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = MllamaConfig(
        vision_config={**vision, "supported_aspect_ratios": [[1, 1]]},
        text_config={**text, "rope_parameters": rope},
        image_token_index=shape.image_token,
    )
    return MllamaForConditionalGeneration(config)


def build_lm(shape: Shape) -> nn.Module:
    """The bare LM."""
    return LlamaForCausalLM(LlamaConfig(**llama(shape, shape.layers)))


BUILD = {"mmgpt": build_mmgpt, "idefics": build_idefics, "mllama": build_mllama, "lm": build_lm}


# What is compiled of a peer for training, each by itself: its encoders and layers.
LAYERS = {
    "idefics": lambda model: [
        model.vision_model,
        model.perceiver_resampler,
        *model.layers,
        *model.gated_cross_attn_layers,
    ],
    "mllama": lambda model: [model.vision_model, *model.language_model.layers],
    "lm": lambda model: model.layers,
}


def build(kind: str, shape: Shape) -> nn.Module:
    """Make a model of random weights on the device."""
    set_seed(0)
    with torch.device(DEVICE), local_torch_dtype(DTYPE, kind):
        model = BUILD[kind](shape)
    return model.to(DEVICE, DTYPE).eval()


def inputs(kind: str, shape: Shape, rows: int, tokens: int, images: int) -> dict[str, torch.Tensor]:
    """Make random text with its pictures spread over it, as the model of that kind takes them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, shape.vocabulary - 10, (rows, tokens), generator=generator)
    ids[:, 1 :: tokens // images][:, :images] = shape.image_token
    ids = ids.to(DEVICE)
    pixels = torch.randn(rows, images, 3, shape.side, shape.side, generator=generator).to(DEVICE, DTYPE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = (ids == shape.image_token).cumsum(-1)[..., None] == torch.arange(1, images + 1, device=DEVICE)  # (B, T, M)
    if kind == "idefics":
        batch |= {"pixel_values": pixels, "image_attention_mask": seen.long()}
    elif kind == "mllama":
        ones = torch.ones(rows, images, dtype=torch.long, device=DEVICE)
        batch |= {"pixel_values": pixels[:, :, None], "cross_attention_mask": seen.long()[..., None]}
        batch |= {"aspect_ratio_ids": ones, "aspect_ratio_mask": ones[..., None]}
    elif kind == "mmgpt":
        batch["pixel_values"] = pixels
    return batch


def half_learnt(kind: str, shape: Shape, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """A batch of full rows with a picture each; the second half of the tokens is learnt."""
    batch = inputs(kind, shape, rows, tokens, 1)
    labels = batch["input_ids"].clone()
    labels[:, : tokens // 2] = -100
    return {**batch, "labels": labels}


def static_cache(model: nn.Module, shape: Shape, rows: int, images: int, length: int) -> StaticCache:
    """Make the static cache of a peer ahead, with all its tensors, and for many calls of `generate`.

    Left to itself, `generate` makes one in every call, whose new addresses are captured anew; and Mllama's, whose
    layers of cross-attention it makes anew after they had their tensors, gets those inside of a compiled prompt:
    "accessing tensor output of CUDAGraphs that has been overwritten by a subsequent run".
    """
    config = model.config.get_text_config(decoder=True)
    cache = StaticCache(config, max_cache_len=length)
    patches = (shape.side // shape.patch) ** 2 + 1
    for number in getattr(config, "cross_attention_layers", ()):
        cache.layers[number] = StaticLayer(max_cache_len=images * patches)
    cache.early_initialization(rows, shape.heads, shape.hidden // shape.heads, DTYPE, torch.device(DEVICE))
    return cache


# The clock


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(run: Callable, repeats: int, warmup: int = 1) -> tuple[float, float | None]:
    """Time a call.

    Returns:
        Seconds, the median over repeats, and the peak of the device's memory in GB, weights included.
    """
    for _ in range(warmup):
        run()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times), torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None


def free() -> None:
    """Give back what the last model held."""
    gc.collect()
    torch._dynamo.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def roofline() -> dict[str, float]:
    """Measure what the card does at best: a copy and a matrix product."""
    size = 2**32 if DEVICE == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy, _ = measure(partial(target.copy_, source), 10, 3)
    n = 8192 if DEVICE == "cuda" else 512
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product, _ = measure(partial(torch.matmul, a, b), 10, 3)
    return {"copy_tb_s": 2 * size / copy / 1e12, "matmul_tflop_s": 2 * n**3 / product / 1e12}


def bytes_a_token(model: nn.Module) -> int:
    """What decoding one token has to read: each weight of LM and blocks, but for embedding and image keys."""
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if "text_model" in name and "embed_tokens" not in name and "to_kv" not in name
    )
