"""Old checkpoints become MMGPT models: OpenFlamingo 1 and 2, and the LoRA adapters of Multimodal-GPT.

    python -m modeling_mmgpt.converting_mmgpt flamingo --help
    python -m modeling_mmgpt.converting_mmgpt lora --help

These make the folder of a model or an adapter. `examples/convert_checkpoint.py` puts its processor beside it, and
`docs/old_checkpoints.md` says what each released checkpoint needs.

Every key of an old file is used, known to be redundant, or an error. Nothing in a file is ever run. The old names:
https://github.com/mlfoundations/open_flamingo/blob/v2.0.1/open_flamingo/src/flamingo.py,
https://github.com/open-mmlab/Multimodal-GPT/blob/main/mmgpt/train/train_utils.py.

Not part of the remote code. Letters: `V` vocabulary, `D` width, `r` rank.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .conditioning_mmgpt import decoder_layers
from .configuration_mmgpt import MMGPTConfig, MMGPTVisionConfig
from .conversion.old_files import read_weights
from .modeling_mmgpt import MMGPTForConditionalGeneration
from .vision_mmgpt import load_vision_tower


logger = logging.get_logger(__name__)

# Old name -> new name, every rule applied in this order; {layers} and {head} are the paths in the LM.
RENAMES = (
    (r"^module\.", ""),  # DistributedDataParallel
    (r"^lang_encoder\.base_model\.model\.", "lang_encoder."),  # PEFT
    (r"^lang_encoder\.gated_cross_attn_layers\.(\d+)\.", r"lang_encoder.{layers}.\1.gated_cross_attn_layer."),  # alias
    (r"^lang_encoder\.old_decoder_blocks\.(\d+)\.", r"lang_encoder.{layers}.\1.decoder_layer."),  # alias
    (r"^lang_encoder\.(embed_out|lm_head)\.", "lang_encoder.{head}."),  # GPT-NeoX has had both
    (r"^lang_encoder\.", "model.text_model."),
    (r"^perceiver\.", "model.resampler."),
    (r"^vision_encoder\.(visual\.)?", "model.vision_tower."),
    (r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight"),  # PEFT 0.3 -> the names of its files, and of PEFT 0.2
)

# New names that nobody needs: buffers that transformers <= 4.30 saved, and open_clip's projection.
REDUNDANT = (
    r"\.decoder_layer\.[a-z_]+\.rotary_emb\.inv_freq$",
    r"\.decoder_layer\.(attention|attn)\.(bias|masked_bias)$",
    r"^model\.vision_tower\.proj$",
)

# Fields of an MPT config that transformers' MPT does not read, and the one value each has there.
# https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mpt/modeling_mpt.py
MPT_FIXED = {
    "qk_ln": False,
    "attn_qk_ln": False,  # its name in the 1B models
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_type": "multihead_attention",
    "prefix_lm": False,
    "no_bias": True,
    "expansion_ratio": 4,
    "logit_scale": None,
}


def convert_flamingo(
    checkpoint: str | os.PathLike,
    language_model: str | os.PathLike,
    vision_tower: str | os.PathLike,
    vision_config: str | dict,
    *,
    cross_attn_every_n_layers: int,
    media_attention: str,
    image_token_id: int,
    end_of_chunk_token_id: int,
    pad_token_id: int | None = None,
    resampler: dict | None = None,
    cross_attention: dict | None = None,
    vision_post_norm: bool = False,
    dtype: torch.dtype | None = None,
    lm_head: str | os.PathLike | None = None,
) -> MMGPTForConditionalGeneration:
    """Join an OpenFlamingo checkpoint, 1 or 2, with the LM and the vision tower it was trained on.

    Args:
        checkpoint: `checkpoint.pt`: filtered or complete, flat or a training dictionary, with `module.` or without.
        language_model: Folder or Hub id of the LM with its original vocabulary; it gets that of the checkpoint.
        vision_tower: An open_clip state dict (`.safetensors`, `.pt`), or an open_clip pretrained tag.
        vision_config: An open_clip model name, or its model config. `quick_gelu` has to be what the tag needs.
        cross_attn_every_n_layers: A gated block stands before every n-th decoder layer. Released: 4 for the 9B models
            and Multimodal-GPT, 2 for 4B, 1 for 3B.
        media_attention: Which image a token attends to. There is no default, for nothing in a file tells.
            `"following"` for OpenFlamingo-9B version 1 and for Multimodal-GPT, whose code lets a token attend to the
            next image unless `use_media_placement_augmentation` is on, and always at inference: in its prompt only
            the words before `<image>`, never the reply, look at the picture. `"preceding"` for every OpenFlamingo 2,
            which dropped the flag. `"all_preceding"` for models trained with `only_attend_immediate_media=False`.
            https://github.com/mlfoundations/open_flamingo/issues/242
        image_token_id: Id of `<image>`.
        end_of_chunk_token_id: Id of `<|endofchunk|>`.
        pad_token_id: Id of the padding token; by default that of the LM.
        resampler: `num_heads` and `head_dim` where they are not 8 and 64; all other sizes are read off the checkpoint.
        cross_attention: Likewise.
        vision_post_norm: Patch tokens after the tower's last norm. For models trained with open_clip 2.23 or later;
            the released ones saw them before it.
        dtype: Data type of all weights; by default that of the LM.
        lm_head: A file of one tensor `(V, D)`, the LM head with the rows of the added tokens. OpenFlamingo neither
            trained nor saved these rows of an untied head. Without the file they become the mean of the others.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is cut off or holds more than tensors, if keys are missing, left over or of another
            shape (the message names the first of each and what was expected), if an id lies outside the vocabulary,
            or if the LM is an MPT that transformers cannot express.
    """
    weights, _ = read_weights(checkpoint)
    if not any(key.endswith("perceiver.latents") for key in weights):
        raise ValueError(
            f"{checkpoint} is no OpenFlamingo checkpoint: expected `perceiver.latents` and others, found "
            f"{sorted(weights)[:5]}."
        )
    _reject_mpt(language_model)
    text_model = _load_language_model(language_model, dtype)
    found = _rename(weights, text_model)
    if lm_head is not None:
        _add_head(found, lm_head, text_model)
    ids = {"image": image_token_id, "end_of_chunk": end_of_chunk_token_id, "pad": pad_token_id}
    _resize_vocabulary(text_model, found, ids)
    tower_weights, tower_config = _load_tower(vision_tower, vision_config, vision_post_norm, text_model.dtype)
    model = MMGPTForConditionalGeneration.from_vision_text_pretrained(
        tower_weights,
        text_model,
        vision_config=tower_config,
        image_token_id=image_token_id,
        end_of_chunk_token_id=end_of_chunk_token_id,
        pad_token_id=pad_token_id,
        dtype=dtype,
        cross_attn_every_n_layers=cross_attn_every_n_layers,
        media_attention=media_attention,
        resampler={**_resampler_sizes(found), **(resampler or {})},
        cross_attention={**_block_sizes(found), **(cross_attention or {})},
    )
    _fill(model, found, checkpoint)
    return model.eval()


def convert_lora(
    lora_checkpoint: str | os.PathLike,
    base: str | os.PathLike,
    output_dir: str | os.PathLike,
    lora_alpha: float | None = None,
) -> Path:
    """Turn a LoRA file of Multimodal-GPT into a PEFT folder.

    Args:
        lora_checkpoint: `.pt` of a training (final, per epoch, released, with a mmengine config) or `.safetensors`.
        base: Folder or Hub id of the model from [`convert_flamingo`]. A folder is recorded by its absolute path.
        output_dir: The folder to make; written only if all of it is right.
        lora_alpha: The update is `lora_alpha / r * B @ A`. Needed where the file does not say.

    Returns:
        `output_dir`, for `AutoModel.from_pretrained(output_dir)` or `PeftModel.from_pretrained(base, output_dir)`.

    Raises:
        FileExistsError: If `output_dir` holds something.
        FileNotFoundError: If the file is missing.
        ValueError: If the file cannot be read without running it, if it is for another base (the message names the
            first keys that do not fit and what was expected), or if nobody says what `lora_alpha` is.
    """
    import peft

    check_free(output_dir)
    weights, settings = read_weights(lora_checkpoint)
    lora_alpha = _lora_alpha(lora_checkpoint, settings, lora_alpha)
    config = AutoConfig.from_pretrained(base)
    if not isinstance(config, MMGPTConfig):
        raise ValueError(f"{base} is a {config.model_type!r}, no MMGPT model: convert the checkpoint it is for first.")
    with torch.device("meta"):
        model = MMGPTForConditionalGeneration(config)
    found = _rename(weights, model.model.text_model)
    pattern, rank = _check_lora(found, model, lora_checkpoint)
    adapter = peft.LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=settings.get("lora_dropout", 0.0),
        target_modules=pattern,
        base_model_name_or_path=str(Path(base).resolve() if Path(base).exists() else base),
        inference_mode=True,
    )
    with new_folder(output_dir) as folder:
        adapter.save_pretrained(folder)
        tensors = {f"base_model.model.{name}": tensor for name, (_, tensor) in found.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return Path(output_dir)


def _rename(weights: dict[str, torch.Tensor], text_model: PreTrainedModel) -> dict[str, tuple[str, torch.Tensor]]:
    """Give every weight its new name.

    Returns:
        New name -> old name and tensor. Aliases and tied weights meet under one name.

    Raises:
        ValueError: If two that meet differ.
    """
    decoder, attribute = decoder_layers(text_model)
    layers = f"{_name_of(text_model, decoder)}.{attribute}"
    head = _name_of(text_model, text_model.get_output_embeddings())
    rules = [(old, new.replace("{layers}", layers).replace("{head}", head)) for old, new in RENAMES]
    tied = {
        f"model.text_model.{key}": f"model.text_model.{to}" for key, to in text_model.all_tied_weights_keys.items()
    }
    has_clip = any(re.match(r"(module\.)?vision_encoder\.visual\.", key) for key in weights)
    found = {}
    for old, tensor in weights.items():
        if has_clip and re.match(r"(module\.)?vision_encoder\.(?!visual\.)", old):
            continue  # CLIP's text tower
        name = old
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        _add(found, tied.get(name, name), old, tensor)
    return found


def _add(found: dict[str, tuple[str, torch.Tensor]], name: str, old: str, tensor: torch.Tensor) -> None:
    """Enter a weight; a second one of the same name has to be equal to the first."""
    other, first = found.setdefault(name, (old, tensor))
    same = first.data_ptr() == tensor.data_ptr() and first.shape == tensor.shape
    if not same and not torch.equal(first, tensor):
        raise ValueError(f"{other!r} and {old!r} are two names of one weight, {name!r}, and differ.")


def _add_head(
    found: dict[str, tuple[str, torch.Tensor]], path: str | os.PathLike, text_model: PreTrainedModel
) -> None:
    """Enter the LM head of a file of its own."""
    head, _ = read_weights(path)
    if len(head) != 1:
        raise ValueError(f"{path} holds {sorted(head)[:5]}; expected the LM head, one tensor, alone.")
    name = _name_of(text_model, text_model.get_output_embeddings())
    if text_model.config.tie_word_embeddings:
        name = _name_of(text_model, text_model.get_input_embeddings())
    ((old, tensor),) = head.items()
    _add(found, f"model.text_model.{name}.weight", old, tensor)


def _name_of(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _load_language_model(language_model: str | os.PathLike, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load the LM, every weight of it: transformers would draw those that its files lack, and warn.

    Raises:
        ValueError: If files and config do not fit each other.
    """
    try:
        text_model, report = AutoModelForCausalLM.from_pretrained(
            language_model, dtype=dtype or "auto", output_loading_info=True
        )
    except (OSError, ValueError):  # transformers' own sentences
        raise
    except Exception as error:  # a config that lies leads anywhere
        raise ValueError(f"{language_model} cannot be loaded: its config and its weights do not fit.") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{language_model} lacks {len(missing)} weights that its config speaks of, first {missing[:5]}."
        )
    return text_model


def _reject_mpt(language_model: str | os.PathLike) -> None:
    """Raise by name on what transformers' MPT would silently compute otherwise."""
    config, _ = PreTrainedConfig.get_config_dict(language_model)
    if config.get("model_type") not in ("mpt", "mosaic_gpt"):
        return
    fields = {**config, **(config.get("attn_config") or {})}
    wrong = {key: fields[key] for key, value in MPT_FIXED.items() if fields.get(key, value) != value}
    if wrong:
        expected = {key: MPT_FIXED[key] for key in wrong}
        raise ValueError(f"{language_model} is an MPT with {wrong}; transformers' MPT is built with {expected} only.")


def _resize_vocabulary(text_model: PreTrainedModel, found: dict, ids: dict[str, int | None]) -> None:
    """Give the LM the rows of the checkpoint's embedding; new rows of a head that is not in it become the mean."""
    name = f"model.text_model.{_name_of(text_model, text_model.get_input_embeddings())}.weight"
    if name not in found:
        given = [old for old, _ in found.values() if "lang_encoder" in old]
        raise ValueError(
            f"The checkpoint holds no {_old_name(name)!r}, the embedding of {type(text_model).__name__}: it is of "
            f"another LM. Its keys begin with {given[:5]}."
        )
    rows, before = _matrix_shape(found, name)[0], text_model.get_input_embeddings().num_embeddings
    outside = {f"{key}_token_id": value for key, value in ids.items() if value is not None and not 0 <= value < rows}
    if outside:
        raise ValueError(f"{outside} lie outside the vocabulary of the checkpoint, which has {rows} rows.")
    text_model.resize_token_embeddings(rows, mean_resizing=False)
    head = text_model.get_output_embeddings()
    head_name = f"model.text_model.{_name_of(text_model, head)}.weight"
    if rows > before and head_name not in found and not text_model.config.tie_word_embeddings:
        with torch.no_grad():
            head.weight[before:] = head.weight[:before].mean(dim=0, dtype=torch.float32)
        logger.warning(
            f"The checkpoint does not hold the LM head's rows {before} to {rows - 1}, of the added tokens: they are "
            "set to the mean of the others. Give `lm_head` if you have them."
        )


def _load_tower(
    vision_tower: str | os.PathLike, vision_config: str | dict, post_norm: bool, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], MMGPTVisionConfig]:
    """Read the tower's weights, as `dtype`, and its config with `post_norm`."""
    vision = str(vision_tower)
    if Path(vision).is_file() or vision.endswith((".safetensors", ".pt", ".bin")):
        vision, _ = read_weights(vision)
    elif not isinstance(vision_config, str):
        raise ValueError(f"{vision!r} is no file, and as a pretrained tag it needs the open_clip name of its model.")
    tower, config = load_vision_tower(vision, vision_config)
    config.post_norm = post_norm
    return tower.to(dtype).state_dict(), config


def _resampler_sizes(found: dict) -> dict[str, int]:
    """Read off the checkpoint what its shapes tell of the resampler; heads are not among it."""
    shapes = _shapes(found, "model.resampler.")
    num_latents, width = _matrix_shape(found, "model.resampler.latents")
    layers = [int(key.split(".")[1]) for key in shapes if key.startswith("layers.")]
    sizes = {"depth": 1 + max(layers, default=0), "num_latents": num_latents}
    if "layers.0.1.1.weight" in shapes:
        sizes["ff_mult"] = _matrix_shape(found, "model.resampler.layers.0.1.1.weight")[0] // width
    for key, embeddings in (("max_num_frames", "frame_embs"), ("max_num_images", "media_time_embs")):
        if shapes.get(embeddings):  # not of a single number
            sizes[key] = shapes[embeddings][0]
    return sizes


def _block_sizes(found: dict) -> dict[str, int]:
    """Likewise of the gated blocks."""
    up = next((name for name in found if name.endswith("gated_cross_attn_layer.ff.1.weight")), None)
    if up is None:
        return {}
    inner, width = _matrix_shape(found, up)
    return {"ff_mult": inner // width}


def _matrix_shape(found: dict, name: str) -> torch.Size:
    """Shape of a weight that sizes are read off."""
    if name not in found:
        raise ValueError(f"The checkpoint holds no {_old_name(name)!r}.")
    old, tensor = found[name]
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise ValueError(f"{old!r} of the checkpoint is {tuple(tensor.shape)}; expected a matrix.")
    return tensor.shape


def _shapes(found: dict, prefix: str) -> dict[str, torch.Size]:
    return {name[len(prefix) :]: tensor.shape for name, (_, tensor) in found.items() if name.startswith(prefix)}


def _fill(model: MMGPTForConditionalGeneration, found: dict, path: str | os.PathLike) -> None:
    """Copy the weights into the model, if every one of them has its place and none is wanting.

    Required are the resampler, the gated blocks and the input embedding; the LM's and the tower's own weights are laid
    over those of their files where the checkpoint has them.
    """
    expected = model.state_dict()
    layers = {name.partition(".decoder_layer.")[0] for name in expected}
    embedding = _name_of(model, model.get_input_embeddings())
    used = {name: entry for name, entry in found.items() if name in expected}
    left = {name: entry for name, entry in found.items() if name not in expected and not _redundant(name, layers)}
    required = [
        name
        for name in expected
        if name.startswith("model.resampler.") or ".gated_cross_attn_layer." in name or name == f"{embedding}.weight"
    ]
    _complain(
        path,
        _describe(model.config),
        missing=[_old_name(name) for name in required if name not in found],
        unexpected=[old for old, _ in left.values()],
        shapes={old: (tensor.shape, expected[name].shape) for name, (old, tensor) in used.items()},
    )
    with torch.no_grad():
        for name, (_, tensor) in logging.tqdm(used.items(), desc="Converting", unit="tensor"):
            expected[name].copy_(tensor)


def _redundant(name: str, layers: set[str]) -> bool:
    """Whether a weight may be left; a layer's, only if the model has that layer."""
    layer, found, _ = name.partition(".decoder_layer.")
    return any(re.search(pattern, name) for pattern in REDUNDANT) and (not found or layer in layers)


def _complain(
    path: str | os.PathLike,
    expected: str,
    missing: list[str],
    unexpected: list[str],
    shapes: dict[str, tuple[torch.Size, torch.Size]],
) -> None:
    """Raise if keys do not fit, naming the first five of each kind."""
    reshaped = [
        f"{key} is {tuple(found)}, expected {tuple(wanted)}"
        for key, (found, wanted) in shapes.items()
        if found != wanted
    ]
    kinds = {"missing": missing, "not expected": unexpected, "of another shape": reshaped}
    if any(kinds.values()):
        listed = "; ".join(f"{len(keys)} {kind}, first {keys[:5]}" for kind, keys in kinds.items() if keys)
        raise ValueError(f"{path} does not fit: {listed}. Expected: {expected}.")


def _describe(config: MMGPTConfig) -> str:
    text, every = config.text_config, config.cross_attn_every_n_layers
    blocks = list(range(every - 1, text.num_hidden_layers, every))
    resampler, cross_attention = config.resampler, config.cross_attention
    return (
        f"{text.model_type} with {text.num_hidden_layers} layers of width {text.hidden_size} and blocks before layers "
        f"{blocks} (cross_attn_every_n_layers={every}) of {cross_attention['num_heads']} heads x "
        f"{cross_attention['head_dim']}; tower of width {config.vision_config.hidden_size}; resampler of "
        f"{resampler['num_heads']} heads x {resampler['head_dim']}"
    )


def _old_name(name: str) -> str:
    """Put a new name back as it is in a flat checkpoint."""
    return name.replace("model.resampler.", "perceiver.").replace("model.text_model.", "lang_encoder.")


def _lora_alpha(path: str | os.PathLike, settings: dict, given: float | None) -> float:
    """Take `lora_alpha` from the file or from the caller; both have to agree."""
    own = settings.get("lora_alpha")
    if own is None and given is None:
        raise ValueError(f"{path} does not say what `lora_alpha` is: give it.")
    if own is not None and given is not None and own != given:
        raise ValueError(f"`lora_alpha` is {given}, but {path} says {own}.")
    return own if given is None else given


def _check_lora(found: dict, model: MMGPTForConditionalGeneration, path: str | os.PathLike) -> tuple[str, int]:
    """Look whether a LoRA fits the base.

    Returns:
        The pattern of `target_modules`, which matches exactly the adapted modules, and the rank.
    """
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = {name.rpartition(".lora_")[0] for name in found} & set(weights)
    pattern = _target_pattern(names)
    rank = min((tensor.shape[0] for name, (_, tensor) in found.items() if ".lora_A." in name), default=0)
    wanted = {}
    for name in (name for name in weights if re.fullmatch(pattern, name)):
        out_features, in_features = weights[name].shape
        wanted[f"{name}.lora_A.weight"] = torch.Size([rank, in_features])
        wanted[f"{name}.lora_B.weight"] = torch.Size([out_features, rank])
    _complain(
        path,
        f"lora_A and lora_B of one rank for {_describe(model.config)}",
        missing=[_old_name(name).replace(".", ".base_model.model.", 1) for name in wanted if name not in found],
        unexpected=[old for name, (old, _) in found.items() if name not in wanted] + ([] if found else ["(no key)"]),
        shapes={old: (tensor.shape, wanted[name]) for name, (old, tensor) in found.items() if name in wanted},
    )
    return pattern, rank


def _target_pattern(names: set[str]) -> str:
    """Match modules by what they are called in their layer, as [`~modeling_mmgpt.adapters_mmgpt.lora_config`]."""
    targets = {re.sub(r"^.*?\.\d+\.", "", name) for name in names}
    return rf"model\.text_model\..*\.({'|'.join(re.escape(target) for target in sorted(targets))})"


def check_free(path: str | os.PathLike) -> None:
    """Look before a long work whether its folder can be made.

    Raises:
        FileExistsError: If something stands there.
    """
    if Path(path).exists() and (not Path(path).is_dir() or any(Path(path).iterdir())):
        raise FileExistsError(f"{path} exists already: give a new folder.")


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Give a folder that takes its name only if all went well, and else disappears."""
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_mmgpt.converting_mmgpt", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    flamingo = commands.add_parser("flamingo", help="an OpenFlamingo checkpoint, 1 or 2 -> a model folder")
    flamingo.add_argument("checkpoint", help="checkpoint.pt")
    flamingo.add_argument("language_model", help="folder or Hub id of the LM, original vocabulary")
    flamingo.add_argument("vision_tower", help="open_clip state dict (.safetensors, .pt) or pretrained tag: openai")
    flamingo.add_argument("vision_config", help="open_clip model name, ViT-L-14-quickgelu, or a .json of its config")
    flamingo.add_argument("output_dir", help="the folder to make")
    flamingo.add_argument("--cross_attn_every_n_layers", type=int, required=True)
    flamingo.add_argument(
        "--media_attention",
        required=True,
        choices=["preceding", "all_preceding", "following"],
        help="following: OpenFlamingo 1 and Multimodal-GPT; preceding: OpenFlamingo 2",
    )
    flamingo.add_argument("--image_token_id", type=int, required=True)
    flamingo.add_argument("--end_of_chunk_token_id", type=int, required=True)
    flamingo.add_argument("--pad_token_id", type=int)
    flamingo.add_argument("--resampler", type=json.loads, help='JSON, such as {"num_heads": 4, "head_dim": 16}')
    flamingo.add_argument("--cross_attention", type=json.loads, help="likewise")
    flamingo.add_argument("--vision_post_norm", action="store_true", help="trained with open_clip >= 2.23")
    flamingo.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the LM")
    flamingo.add_argument("--lm_head", help="file with the LM head, rows of the added tokens included")
    lora = commands.add_parser("lora", help="a LoRA of Multimodal-GPT -> a PEFT folder")
    lora.add_argument("lora_checkpoint", help=".pt or .safetensors")
    lora.add_argument("base", help="folder or Hub id that `flamingo` made")
    lora.add_argument("output_dir", help="the folder to make")
    lora.add_argument("--lora_alpha", type=float, help="where the file does not say")
    return parser.parse_args()


def main() -> None:
    """Convert from the command line."""
    arguments = vars(_parse())
    if arguments.pop("command") == "lora":
        convert_lora(**arguments)
        return
    output_dir = arguments.pop("output_dir")
    check_free(output_dir)
    if arguments["vision_config"].endswith(".json"):
        arguments["vision_config"] = json.loads(Path(arguments["vision_config"]).read_text())
    arguments["dtype"] = arguments["dtype"] and getattr(torch, arguments["dtype"])
    model = convert_flamingo(**arguments)
    with new_folder(output_dir) as folder:
        model.save_pretrained(folder, max_shard_size="5GB")


if __name__ == "__main__":
    main()
