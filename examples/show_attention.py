"""Show what a model attends to while it answers: which picture, how strongly, and where in it.

    python examples/show_attention.py outputs/quickstart/adapter "What colour is the circle?" --image scene.png

Draws `attention.png`, one column for each of `--media-attention`: the model's own mode, and `following`, the mode
of Multimodal-GPT as released, in which nothing after the last picture attends to it.

`docs/attention.md` explains what is drawn and how well it points. Needs
`pip install -e ".[demo]" -c constraints.txt`.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from modeling_mmgpt.vision_mmgpt import patch_tokens
from processing_mmgpt.image_files_mmgpt import open_image


MODES = ("preceding", "all_preceding", "following")
COLUMNS = 4  # maps beside each other


@torch.no_grad()
def gates(model: PreTrainedModel) -> torch.Tensor:
    """How far each block is open, `(blocks, 2)`: tanh of the gates of its attention and of its feed-forward."""
    blocks = [m for name, m in model.named_modules() if name.endswith("gated_cross_attn_layer")]
    return torch.stack([torch.cat([b.attn_gate, b.ff_gate]) for b in blocks if b is not None]).float().tanh()


@torch.no_grad()
def resample(model: PreTrainedModel, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Resample pictures, and trace each latent back to the patches.

    Attention rollout, https://arxiv.org/abs/2005.00928: weights are averaged over heads, half of a layer's output is
    taken to be its input, and layers are multiplied. The first latents are learnt, and hold no patch. The tower's
    own mixing of patches is left out.

    Args:
        model: In the eager implementation, which keeps the weights.
        pixel_values: `(1, M, 3, height, width)`.

    Returns:
        The latents `(1, M, N, D)`, and the share of each patch in them, `(M, N, P)`, with rows that sum to one.
    """
    weights: list[torch.Tensor] = []
    tokens = patch_tokens(model.model.vision_tower, pixel_values[0].to(model.dtype))  # (M, P, D)
    latents = model.model.resampler(tokens[None, :, None], attentions=weights)  # (1, M, N, D)
    P = tokens.shape[1]
    made_of = torch.zeros(*latents.shape[1:3], P)  # (M, N, P)
    for layer in weights:
        layer = layer.float().mean(dim=1)  # (M, N, P + N)
        made_of = (made_of + layer[..., :P] + layer[..., P:] @ made_of) / 2
    return latents, made_of / made_of.sum(dim=-1, keepdim=True)


@torch.no_grad()
def look(model: PreTrainedModel, inputs: dict) -> torch.Tensor:
    """Run the model and gather what each token attends to, `(T, M, P)`.

    Every block's weights, averaged over its heads, times its gate; summed over blocks, and carried from latents to
    patches by [`resample`]. Summed over `P` it tells how strongly a token attends to a picture: at most the sum of
    the gates, and 0 where it attends to none.

    Args:
        model: In the eager implementation.
        inputs: A batch of one row from the processor, with pictures.
    """
    latents, made_of = resample(model, inputs["pixel_values"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    outputs = model(input_ids=ids, attention_mask=mask, image_latents=latents, output_attentions=True)
    weights = torch.stack([w[0].float().mean(dim=0) for w in outputs.cross_attentions])  # (blocks, T, M*N)
    strength = torch.einsum("bts,b->ts", weights, gates(model)[:, 0].abs())
    return torch.einsum("tmn,mnp->tmp", strength.unflatten(-1, made_of.shape[:2]), made_of)


def above_even(heat: torch.Tensor) -> torch.Tensor:
    """The part of `(M, P)` above an even share of all patches of all pictures, scaled to sum to one."""
    above = (heat - heat.mean()).clamp(min=0)
    return above / above.sum().clamp(min=torch.finfo(above.dtype).tiny)


def answer(model: PreTrainedModel, processor: ProcessorMixin, messages: list[dict]) -> str:
    """The greedy reply."""
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def encode(processor: ProcessorMixin, messages: list[dict], reply: str) -> tuple[dict, list[str], list[int]]:
    """The conversation with its reply as a batch, its tokens in words, and the positions that write the replies.

    A token is written at the position before it, whose attention shows what the model used to write it.
    """
    messages = [*messages, {"role": "assistant", "content": reply}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens = [processor.tokenizer.decode([token]).replace("\n", "⏎") for token in inputs["input_ids"][0].tolist()]
    written = inputs["assistant_masks"][0].nonzero().flatten().tolist()[:-1]  # without the last end token
    return inputs, tokens, [place - 1 for place in written]


def crop(processor: ProcessorMixin, source: str) -> Image.Image:
    """The part of a picture that the model sees: the square in its middle."""
    picture = ImageOps.exif_transpose(open_image(source)).convert("RGB")
    return ImageOps.fit(picture, (max(256, processor.image_processor.size),) * 2)


def draw_tokens(axes, tokens: list[str], heat: torch.Tensor, highest: float) -> None:
    """One line for each picture: how strongly each token attends to it."""
    strength = heat.sum(dim=-1).T  # (M, T)
    axes.imshow(strength, cmap="magma", aspect="auto", vmin=0, vmax=highest)
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6)
    axes.set_yticks(range(len(strength)), [f"picture {number + 1}" for number in range(len(strength))], fontsize=7)


def draw_map(axes, picture: Image.Image, heat: torch.Tensor) -> None:
    """A picture, and over it the heat of its patches `(P,)`, which sums to at most one."""
    side = math.isqrt(heat.numel())
    heat, place = heat.view(side, side), (0, side, side, 0)
    axes.imshow(picture.convert("L"), cmap="gray", vmax=400, extent=place)
    axes.imshow(heat, cmap="inferno", alpha=heat.clamp(max=0.2) / 0.25, extent=place, vmin=0, vmax=0.4)
    axes.axis("off")


def draw_gates(axes, opened: torch.Tensor) -> None:
    """A pair of bars for each block."""
    for number, name in enumerate(("attention", "feed-forward")):
        axes.bar(torch.arange(len(opened)) + 0.4 * number, opened[:, number].abs(), width=0.4, label=name)
    axes.set_xticks(range(len(opened)), [f"block {number}" for number in range(len(opened))], fontsize=7)
    axes.set_title("how far the gates are open: |tanh|", fontsize=8)
    axes.legend(fontsize=7)


def draw(columns: list[dict], pictures: list[Image.Image], opened: torch.Tensor, path: Path) -> None:
    """Draw a column for each mode, and the gates below.

    Args:
        columns: Of each mode its `title`, `tokens`, `heat` `(T, M, P)`, and the `places` that write the reply.
        pictures: As the model sees them.
        opened: From [`gates`].
        path: Where the PNG goes.
    """
    maps = max(len(column["places"]) * len(pictures) for column in columns)
    rows = -(-maps // COLUMNS)
    figure = Figure(figsize=(7 * len(columns), 3.4 + 1.9 * rows), layout="constrained")
    grid = figure.add_gridspec(2 + rows, COLUMNS * len(columns), height_ratios=[0.2 * len(pictures), *[1.6] * rows, 1])
    highest = max(column["heat"].sum(dim=-1).max().item() for column in columns)
    for number, column in enumerate(columns):
        left = COLUMNS * number
        strip = figure.add_subplot(grid[0, left : left + COLUMNS])
        strip.set_title(column["title"], fontsize=10)
        draw_tokens(strip, column["tokens"], column["heat"], highest)
        pairs = [(place, picture) for place in column["places"] for picture in range(len(pictures))]
        for cell, (place, picture) in enumerate(pairs):
            axes = figure.add_subplot(grid[1 + cell // COLUMNS, left + cell % COLUMNS])
            heat = above_even(column["heat"][place])[picture]  # (P,)
            draw_map(axes, pictures[picture], heat)
            word = column["tokens"][place + 1].strip()
            axes.set_title(f"“{word}”: {heat.sum():.0%} on picture {picture + 1}", fontsize=8)
    below = figure.add_subfigure(grid[-1, :]).subplots(1, 1 + len(pictures), width_ratios=[4, *[1] * len(pictures)])
    draw_gates(below[0], opened)
    for number, picture in enumerate(pictures, start=1):
        below[number].imshow(picture)
        below[number].set_title(f"picture {number}", fontsize=8)
        below[number].axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Load, ask, look, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of an adapter or a model")
    parser.add_argument("question")
    parser.add_argument("--image", action="append", required=True, help="a picture file; may be given several times")
    parser.add_argument("--answer", help="a reply to look at; by default the model's own")
    parser.add_argument("--media-attention", nargs="+", choices=MODES, help="by default the model's and `following`")
    parser.add_argument("--output", type=Path, default=Path("attention.png"))
    args = parser.parse_args()
    try:
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto", attn_implementation="eager")
        processor = AutoProcessor.from_pretrained(args.model)
        pictures = [crop(processor, path) for path in args.image]
    except (OSError, ValueError) as error:
        sys.exit(f"The model or a picture cannot be loaded: {error}")
    content = [*({"type": "image", "path": path} for path in args.image), {"type": "text", "text": args.question}]
    messages = [{"role": "user", "content": content}]
    columns = []
    for mode in args.media_attention or dict.fromkeys([model.config.media_attention, "following"]):
        model.config.media_attention = mode
        reply = args.answer or answer(model, processor, messages)
        inputs, tokens, places = encode(processor, messages, reply)
        title = f"{mode}: “{reply}”"
        columns.append({"title": title, "tokens": tokens, "places": places, "heat": look(model, inputs)})
        print(title)
    draw(columns, pictures, gates(model), args.output)
    print(f"see {args.output}")


if __name__ == "__main__":
    main()
