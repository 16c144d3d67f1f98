"""Merge a LoRA adapter into its base: a plain model that loads without PEFT and generates without its extra cost.

    python examples/merge_adapter.py outputs/quickstart/adapter outputs/merged
    python examples/merge_adapter.py outputs/quickstart/adapter outputs/fused --fuse    # of a LLaMA: faster still

The sum is made in float32 and rounded once, to the data type of the base or to `--dtype`. The largest difference of
logits to the adapter on its base, on a probe with a picture, is printed, and stored in `report.json` for the card that
`push_to_hub.py` writes.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

import processing_mmgpt  # noqa: F401 - for the Auto classes
from modeling_mmgpt.adapters_mmgpt import check_adapter
from modeling_mmgpt.saving.whole import whole
from modeling_mmgpt.speed.fusing import fuse_projections


def load_base(adapter: str, dequantize: bool = False) -> tuple[PreTrainedModel, torch.dtype]:
    """Load the base that an adapter names, without the adapter, in float32.

    Returns:
        The base, and the data type that it is saved in.

    Raises:
        ValueError: If the adapter does not fit it; if its weights are quantised, and `dequantize` does not ask for
            their full size.
    """
    recorded = PeftConfig.from_pretrained(adapter)
    name, revision = recorded.base_model_name_or_path, recorded.revision
    config = AutoConfig.from_pretrained(name, revision=revision)
    check_adapter(adapter, config)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and not dequantize:
        raise ValueError(
            f"The base {name} is quantised ({quantised['quant_method']}): rounding the sum to so few bits would lose "
            "much of what the adapter learnt. --dequantize merges into its weights at full size."
        )
    # A repository may hold a base and its adapter; transformers, told to look elsewhere, finds no adapter.
    alone = {"subfolder": "without-adapter"}
    base = AutoModelForImageTextToText.from_pretrained(
        name, revision=revision, dtype=torch.float32, adapter_kwargs=alone
    )
    return base if quantised is None else base.dequantize(), config.dtype


def probe(processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    """A question about a picture of every shade, as input of the model."""
    content = [{"type": "image", "image": Image.radial_gradient("L")}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)


@torch.inference_mode()
def merge(
    base: PreTrainedModel, adapter: str, dtype: torch.dtype, inputs: dict, fuse: bool = False
) -> tuple[PreTrainedModel, dict]:
    """Merge an adapter into its base, in place, and measure the effect of rounding, in float32 arithmetic.

    Args:
        base: The base, in float32.
        adapter: Folder or Hub id of the adapter.
        dtype: Of the merged weights.
        inputs: What to compare the logits on.
        fuse: Join query, key and value, and gate and up, of a LLaMA, see [`fuse_projections`].

    Returns:
        The merged model; the largest difference of its logits to those of the adapter on its base, and the largest
        logit, to compare it with.

    Raises:
        ValueError: If a merged weight is not finite (PEFT's check), or if the LM cannot be fused.
    """
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    before = tuned(**inputs).logits
    rounded = tuned.merge_and_unload(safe_merge=True).to(dtype).float()
    if fuse:
        rounded = fuse_projections(rounded)
    difference = (rounded(**inputs).logits - before).abs().max().item()
    return rounded.to(dtype), {"max_logit_difference": difference, "max_logit": before.abs().max().item()}


def save(model: PreTrainedModel, processor: ProcessorMixin, report: dict, output: Path, dequantized: bool) -> None:
    """Write model, processor and report into a folder that appears only when it is complete.

    A dequantised model cannot be saved in the format of its checkpoint, bitsandbytes', though transformers would try.
    """
    with whole(output) as folder:
        model.save_pretrained(folder, save_original_format=not dequantized)
        processor.save_pretrained(folder)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    """Load, merge, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="folder or Hub id of the adapter, with its processor")
    parser.add_argument("output", type=Path, help="folder to make; it must not be there")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the base")
    parser.add_argument("--fuse", action="store_true", help="fewer, larger matrices, where the LM is a LLaMA")
    parser.add_argument("--dequantize", action="store_true", help="merge into a quantised base, at its full size")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} is there already.")
    try:
        base, dtype = load_base(args.adapter, args.dequantize)
        processor = AutoProcessor.from_pretrained(args.adapter)
        dtype = getattr(torch, args.dtype) if args.dtype else dtype
        model, figures = merge(base, args.adapter, dtype, probe(processor), args.fuse)
    except (OSError, ValueError) as error:
        sys.exit(f"{args.adapter} cannot be merged: {error}")
    kept = Path(args.adapter) / "report.json"
    report = json.loads(kept.read_text()) if kept.is_file() else {}
    report["merge"] = {"dtype": str(dtype).removeprefix("torch."), **figures}
    save(model, processor, report, args.output, args.dequantize)
    print(f"Merged into {args.output} in {report['merge']['dtype']}.")
    print(f"Logits, of {figures['max_logit']:.1f} at most, differ by {figures['max_logit_difference']:.1e} at most.")


if __name__ == "__main__":
    main()
