"""Publish a tuned adapter or a model: stage one flat folder, show it, upload it when told to.

    python push_to_hub.py outputs/quickstart/adapter user/my-adapter           # stages and shows
    python push_to_hub.py outputs/quickstart/adapter user/my-adapter --yes     # uploads

The folder holds weights, processor, card and the remote code, so that it loads with `trust_remote_code=True` where
these packages are not installed. An adapter whose base is only a folder on this machine takes the base with it.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_mmgpt
import processing_mmgpt


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
PROCESSOR_FILES = ("processor_config.json", "chat_template.jinja", "tokenizer*", "special_tokens_map.json")
MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_mmgpt.MMGPTConfig",
    "AutoModel": "modeling_mmgpt.MMGPTForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_mmgpt.MMGPTForConditionalGeneration",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_mmgpt.MMGPTProcessor"}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_mmgpt.MMGPTImageProcessor"}


def stage(source: Path, repo: str, staging: Path, base_model: str | None = None, report: Path | None = None) -> None:
    """Put all that is to be published into one flat folder, which appears only when it is complete.

    Args:
        source: A folder with an adapter or a model, and its processor.
        repo: The name it will have, `user/name`.
        staging: The folder to make; one of an earlier staging is replaced.
        base_model: Hub id of an adapter's base, where the adapter was trained from a local copy of it.
        report: A `report.json` of the quickstart, for the card.

    Raises:
        FileNotFoundError: If `source` is neither adapter nor model, has no processor, or its base cannot be found.
    """
    is_adapter = (source / "adapter_config.json").is_file()
    if not is_adapter and not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has neither adapter_config.json nor config.json: nothing to publish.")
    staging.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=".staging-") as name:
        folder = Path(name) / "folder"
        folder.mkdir()
        _copy(source, folder, PROCESSOR_FILES)
        if is_adapter:
            _copy(source, folder, ADAPTER_FILES)
            _settle_base(folder, repo, base_model)
        else:
            _copy(source, folder, MODEL_FILES)
        _add_remote_code(folder)
        _write_card(folder, repo, report)
        if staging.exists():
            shutil.rmtree(staging)
        folder.rename(staging)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    if not list(source.glob(patterns[0])):
        raise FileNotFoundError(f"{source} has no {patterns[0]}.")
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)


def _settle_base(folder: Path, repo: str, base_model: str | None) -> None:
    """Name the base by something that others can load."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    base = Path(config["base_model_name_or_path"])
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    elif base.is_dir():
        _copy(base, folder, MODEL_FILES)
        config["base_model_name_or_path"] = repo
    elif base.is_absolute():
        raise FileNotFoundError(f"The adapter's base {base} is not there; name its Hub id with --base-model.")
    path.write_text(json.dumps(config, indent=2) + "\n")


def _add_remote_code(folder: Path) -> None:
    """Copy the modules that model and processor import, and point the Auto classes at them."""
    for package, entry in ((modeling_mmgpt, "modeling_mmgpt.py"), (processing_mmgpt, "processing_mmgpt.py")):
        module = Path(package.__file__).with_name(entry)
        for file in (module, *map(Path, get_relative_import_files(module))):
            shutil.copy2(file, folder / file.name)
    if (folder / "config.json").is_file():
        _update(folder / "config.json", lambda config: config.update(auto_map=MODEL_AUTO_MAP))

    def point(config: dict) -> None:
        config["auto_map"] = PROCESSOR_AUTO_MAP
        config["image_processor"]["auto_map"] = IMAGE_PROCESSOR_AUTO_MAP

    _update(folder / "processor_config.json", point)


def _update(path: Path, change) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _write_card(folder: Path, repo: str, report: Path | None) -> None:
    adapter = folder / "adapter_config.json"
    adapter_config = json.loads(adapter.read_text()) if adapter.is_file() else None
    base = None if adapter_config is None else adapter_config["base_model_name_or_path"]
    data = ModelCardData(
        library_name="peft" if adapter_config else "transformers",
        base_model=base if base != repo else None,
        pipeline_tag="image-text-to-text",
        tags=["mmgpt", "flamingo", *(["lora"] if adapter_config else [])],
    )
    parts = [f"---\n{data.to_yaml()}\n---\n\n# {repo.split('/')[-1]}\n", _about(folder, adapter_config, repo)]
    parts.append(LOADING.format(repo=repo))
    if report is not None:
        parts.append(_results(json.loads(report.read_text())))
    ModelCard("\n".join(parts)).save(folder / "README.md")


LOADING = """## How to load it

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)
content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is in the picture?"}}]
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
ids = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

With the package `mmgpt` installed and `import modeling_mmgpt, processing_mmgpt`, `trust_remote_code` is not needed.
"""


def _about(folder: Path, adapter_config: dict | None, repo: str) -> str:
    lines = ["A Flamingo-style vision-language model that holds a dialogue about pictures, made with mmgpt."]
    if adapter_config is not None:
        base = adapter_config["base_model_name_or_path"]
        where = "which stands beside it in this repository" if base == repo else f"`{base}`"
        lines.append(
            f"It is a LoRA adapter (r = {adapter_config['r']}, alpha = {adapter_config['lora_alpha']}) of its base, "
            f"{where}. Adapted modules: `{adapter_config['target_modules']}`."
        )
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        lines.append(f"Text attends to pictures in the mode `{config['media_attention']}`.")
    return "\n\n".join(lines) + "\n"


def _results(report: dict) -> str:
    """The table of a quickstart's report."""
    rows = [
        f"| {name} | {row['accuracy']:.1%} | {row['low']:.1%} .. {row['high']:.1%} | {row['n']} |"
        for name, row in report["skills"].items()
    ]
    head = (
        f"## Results\n\nExact match of the whole greedy reply, by `examples/quickstart.py --seed {report['seed']}`.\n"
    )
    return "\n".join([head, "| skill | right | 95 % interval | questions |", "|---|---|---|---|", *rows, ""])


def show(staging: Path) -> None:
    """Print the staged files with their sizes."""
    files = sorted(staging.iterdir())
    for file in files:
        print(f"{file.stat().st_size:>12,}  {file.name}")
    print(f"{sum(file.stat().st_size for file in files):>12,}  bytes in {staging}")


def main() -> None:
    """Stage, show, and upload if told to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of an adapter or a model, with its processor")
    parser.add_argument("repo", help="user/name on the Hub")
    parser.add_argument("--base-model", help="Hub id of the adapter's base, if it was trained from a local copy")
    parser.add_argument("--report", type=Path, help="report.json of the quickstart, for the card")
    parser.add_argument("--staging", type=Path, help="the folder to stage in (default: outputs/staging/NAME)")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--yes", action="store_true", help="upload")
    args = parser.parse_args()
    staging = args.staging or Path("outputs/staging") / args.repo.split("/")[-1]
    stage(args.source, args.repo, staging, args.base_model, args.report)
    show(staging)
    if not args.yes:
        print("Nothing was uploaded; --yes uploads.")
        return
    api = HfApi()
    api.create_repo(args.repo, private=args.private, exist_ok=True)
    print(api.upload_folder(repo_id=args.repo, folder_path=staging, commit_message="Upload with mmgpt"))


if __name__ == "__main__":
    main()
