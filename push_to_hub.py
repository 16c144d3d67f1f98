"""Publish a tuned adapter, a merged model or a whole base: stage one flat folder, show it, and upload it with `--yes`.

    python push_to_hub.py outputs/quickstart/adapter user/my-adapter --report outputs/quickstart/report.json
    python push_to_hub.py outputs/quickstart/adapter user/my-adapter --report outputs/quickstart/report.json --yes

The first line is a dry run: it lists every file with its size and SHA-256, and what is left out. The second uploads
them in one commit. A push that breaks off leaves the repository as it is, and a repetition skips what has arrived.

The folder holds weights, processor, card and the remote code, so that it loads with `trust_remote_code=True` where
these packages are not installed. An adapter whose base is only a local folder takes the base with it.
`docs/publishing.md` tells what the card is made from.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    hf_hub_download,
)
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_mmgpt
import processing_mmgpt
from modeling_mmgpt import MMGPTConfig
from modeling_mmgpt.adapters_mmgpt import check_adapter
from modeling_mmgpt.saving.leaks import check_folder, check_text
from modeling_mmgpt.saving.whole import whole


CARD = Path(__file__).with_name("model_card.jinja")
# What is published, by name; nothing else is. The first of each must be there.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
PROCESSOR_FILES = ("processor_config.json", "chat_template.jinja", "tokenizer_config.json", "tokenizer.json")
PROCESSOR_FILES += ("tokenizer.model", "special_tokens_map.json")
CODE_FILES = ("*_mmgpt.py",)
MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_mmgpt.MMGPTConfig",
    "AutoModel": "modeling_mmgpt.MMGPTForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_mmgpt.MMGPTForConditionalGeneration",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_mmgpt.MMGPTProcessor"}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_mmgpt.MMGPTImageProcessor"}


def stage(
    source: Path,
    repo: str,
    staging: Path,
    base_model: str | None = None,
    base_revision: str | None = None,
    report: Path | None = None,
    licence: str | None = None,
) -> None:
    """Put all files to be published into one flat folder, which appears only when it is complete.

    Args:
        source: A folder with an adapter or a model, and its processor.
        repo: The name it will have, `user/name`.
        staging: The folder to make; an existing staging is replaced.
        base_model: Hub id of an adapter's base, where the adapter was trained from a local copy of it.
        base_revision: Commit of that base, where the adapter does not name it.
        report: Results of training and evaluation, for the card; by default `source/report.json` if it exists.
        licence: Hub id of the licence; by default that of the base's card.

    Raises:
        FileNotFoundError: If `source` is neither adapter nor model, has no processor, or its base cannot be found.
        ValueError: If a file to be published holds a secret or a path of this machine; if an adapter does not fit its
            base.
    """
    is_adapter = (source / "adapter_config.json").is_file()
    if not is_adapter and not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has neither adapter_config.json nor config.json: nothing to publish.")
    if report is None and (source / "report.json").is_file():
        report = source / "report.json"
    with whole(staging) as folder:
        folder.mkdir()
        _copy(source, folder, PROCESSOR_FILES)
        facts = {"report": {} if report is None else json.loads(report.read_text()), "repo": repo}
        if is_adapter:
            _copy(source, folder, ADAPTER_FILES)
            facts |= _settle_base(folder, repo, base_model, base_revision)
        else:
            _copy(source, folder, MODEL_FILES)
            facts |= _facts_of_base(str(source), None)
        facts["license"] = licence or facts["license"]
        _add_remote_code(folder)
        for config in folder.glob("*config.json"):
            _update(config, _without_paths)
        write_card(folder, facts)
        check_folder(folder, (Path.home(), Path.cwd(), source.resolve()))
        if staging.exists():
            shutil.rmtree(staging)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of these names; a folder of such a name is left out, a link to elsewhere is an error."""
    if not list(source.glob(patterns[0])):
        raise FileNotFoundError(f"{source} has no {patterns[0]}.")
    for file in (file for pattern in patterns for file in source.glob(pattern) if file.is_file()):
        if not file.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{file.name} is a link out of {source}, to {file.resolve()}: put the file there.")
        shutil.copy2(file, target / file.name)


def _settle_base(folder: Path, repo: str, base_model: str | None, base_revision: str | None) -> dict:
    """Name the base by an id that others can load, with its commit; return what the card says of it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    recorded = config["base_model_name_or_path"]
    revision = base_revision or config.get("revision")
    if base_model is None and Path(recorded).is_dir():
        _copy(Path(recorded), folder, MODEL_FILES)
        name, revision = repo, None  # the base is in the same commit
    elif base_model is None and Path(recorded).is_absolute():
        raise FileNotFoundError(f"The adapter's base {recorded} is not there; name its Hub id with --base-model.")
    else:
        name = base_model or recorded
    named = {"base_model_name_or_path": name, "revision": revision}
    _update(folder / "adapter_config.json", lambda config: config | named)
    base = recorded if Path(recorded).is_dir() else name
    facts = _facts_of_base(base, revision)
    if (config := _open_file(base, "config.json", revision)) is not None:
        check_adapter(folder, MMGPTConfig.from_pretrained(config))
    return facts | {"base": name, "base_revision": revision}


def _facts_of_base(base: str, revision: str | None) -> dict:
    """Facts from the config and the card of a base, a folder or a Hub id; `None` where they say nothing."""
    config, card = (_open_file(base, name, revision) for name in ("config.json", "README.md"))
    return {
        "media_attention": None if config is None else json.loads(config.read_text())["media_attention"],
        "license": None if card is None else ModelCard.load(card, ignore_metadata_errors=True).data.license,
    }


def _open_file(base: str, name: str, revision: str | None) -> Path | None:
    if Path(base).is_dir():
        return Path(base) / name if (Path(base) / name).is_file() else None
    try:
        return Path(hf_hub_download(base, name, revision=revision))
    except (EntryNotFoundError, RepositoryNotFoundError):  # not there, or no Hub within reach: the card says less
        return None


def _add_remote_code(folder: Path) -> None:
    """Copy the modules that model and processor import, and point the Auto classes at them."""
    for package, entry in ((modeling_mmgpt, "modeling_mmgpt.py"), (processing_mmgpt, "processing_mmgpt.py")):
        module = Path(package.__file__).with_name(entry)
        for file in (module, *map(Path, get_relative_import_files(module))):
            shutil.copy2(file, folder / file.name)
    if (folder / "config.json").is_file():
        _update(folder / "config.json", lambda config: config | {"auto_map": MODEL_AUTO_MAP})

    def point(config: dict) -> dict:
        image_processor = config["image_processor"] | {"auto_map": IMAGE_PROCESSOR_AUTO_MAP}
        return config | {"auto_map": PROCESSOR_AUTO_MAP, "image_processor": image_processor}

    _update(folder / "processor_config.json", point)


def _update(path: Path, change: Callable[[dict], dict]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2) + "\n")


def _without_paths(value: object, name: str = "") -> object:
    """A config, or a part of it of this name, without names that are local folders."""
    if isinstance(value, dict):
        return {key: _without_paths(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part, name) for part in value]
    is_folder = isinstance(value, str) and (os.path.isabs(value) or os.path.isdir(value))
    return "" if is_folder and name.endswith("name_or_path") else value


def left_behind(source: Path, staging: Path) -> list[str]:
    """Name the files of the source that are not published: optimizer states, logs, checkpoints, and others."""
    staged = {file.name for file in staging.iterdir()}
    return sorted(file.name + "/" * file.is_dir() for file in source.iterdir() if file.name not in staged)


def show(staging: Path) -> None:
    """Print the staged files with their sizes in bytes and their SHA-256."""
    files = sorted(staging.iterdir())
    for file in files:
        with file.open("rb") as opened:
            print(f"{file.stat().st_size:>14,}  {hashlib.file_digest(opened, 'sha256').hexdigest()}  {file.name}")
    print(f"{sum(file.stat().st_size for file in files):>14,}  bytes in {len(files)} files in {staging}")


def upload(
    staging: Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    message: str = "Upload with mmgpt",
) -> CommitInfo:
    """Upload the staged folder in one commit, made only when every file has arrived.

    `HfApi.upload_folder` would make several commits of a large folder, and a reader between two of them would see half
    a model. Files of the last push that are not staged, such as the shards of a larger model, are removed in the same
    commit; other files of the repository stay. The client shows its progress.

    Raises:
        ValueError: If the repository shall be private, but exists and is public; if the message or the name of the
            branch holds a secret.
    """
    check_text("The message or the name of the branch", f"{message}\n{revision}")
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise ValueError(f"{repo} exists already and is public: nothing was uploaded. Make it private there first.")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    additions = [CommitOperationAdd(file.name, str(file)) for file in sorted(staging.iterdir())]
    staged = {addition.path_in_repo for addition in additions}
    ours = ADAPTER_FILES + MODEL_FILES + PROCESSOR_FILES + CODE_FILES
    stale = [
        name
        for name in api.list_repo_files(repo, revision=revision)
        if name not in staged and any(Path(name).match(pattern) for pattern in ours) and "/" not in name
    ]
    try:
        return api.create_commit(
            repo,
            [*additions, *map(CommitOperationDelete, stale)],
            commit_message=message,
            revision=revision,
            create_pr=pull_request,
        )
    except BaseException as error:
        error.add_note(
            f"The upload to {repo} broke off. Its one commit is there whole or not at all: see "
            f"{api.endpoint}/{repo}/commits/{revision or 'main'}. The same command again goes on."
        )
        raise


def write_card(folder: Path, facts: dict) -> None:
    """Write `README.md` for a staged folder, from `model_card.jinja` and what the files say.

    Args:
        folder: The folder.
        facts: `repo`; `report`, see `docs/publishing.md`; `media_attention` and `license`, or `None`; for an adapter,
            `base` and `base_revision`.
    """
    repo, report, base = facts["repo"], facts["report"], facts.get("base")
    results = _eval_results(report)
    data = ModelCardData(
        library_name="transformers" if base is None else "peft",
        license=facts["license"],
        base_model=base if base != repo else None,
        base_model_relation="adapter" if base not in (None, repo) else None,
        pipeline_tag="image-text-to-text",
        tags=["mmgpt", "flamingo", *([] if base is None else ["lora"])],
        model_name=repo.split("/")[-1],
        eval_results=results or None,
    )
    processor = processing_mmgpt.MMGPTProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
    card = ModelCard.from_template(
        data,
        template_path=str(CARD),
        **facts,
        name=repo.split("/")[-1],
        adapter=None if base is None else _facts_of_adapter(folder),
        prompt=processor.apply_chat_template(messages, add_generation_prompt=True),
        packages=", ".join(f"{name} {version(name)}" for name in ("mmgpt", "transformers", "peft", "torch")),
        results=results,
        measured=[report[key] for key in ("protocol", "date", "machine", "versions") if key in report],
    )
    card.save(folder / "README.md")


def _facts_of_adapter(folder: Path) -> dict:
    """What the card says of an adapter's weights: how many, of which modules, and which are not LoRA's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / "adapter_model.safetensors", "np") as weights:
        names = list(weights.keys())
        count = sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "count": count,
        "adapted": sorted({m[1] for name in names if (m := re.search(r"\.\d+\.(?:\w+layer\.)?(.+)\.lora_A", name))}),
        "others": sorted({name.removeprefix("base_model.model.") for name in names if ".lora_" not in name}),
    }


def _eval_results(report: dict) -> list[EvalResult]:
    """The rows of results; the metric of a row is the value that is neither its interval nor its count."""
    dataset, results = report.get("dataset", "own questions"), []
    for name, row in report.get("skills", {}).items():
        metric = next(key for key in row if key not in ("low", "high", "n"))
        results.append(
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=dataset.lower().replace(" ", "-"),
                dataset_name=dataset,
                dataset_config=name,
                metric_type=metric,
                metric_value=row[metric],
            )
        )
    return results


def main() -> None:
    """Stage, show, and upload with `--yes`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of an adapter or a model, with its processor")
    parser.add_argument("repo", help="user/name on the Hub")
    parser.add_argument("--base-model", help="Hub id of the adapter's base, if it was trained from a local copy")
    parser.add_argument("--base-revision", help="commit of that base (default: what the adapter names)")
    parser.add_argument("--report", type=Path, help="JSON of training and evaluation (default: SOURCE/report.json)")
    parser.add_argument("--license", help="Hub id of the licence (default: what the card of the base says)")
    parser.add_argument("--staging", type=Path, help="the folder to stage in (default: outputs/staging/NAME)")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--revision", help="branch to push to, made if it is not there (default: main)")
    where.add_argument("--pull-request", action="store_true", help="open a pull request against main")
    parser.add_argument("--message", default="Upload with mmgpt", help="of the commit")
    parser.add_argument("--yes", action="store_true", help="upload")
    args = parser.parse_args()
    staging = args.staging or Path("outputs/staging") / args.repo.split("/")[-1]
    stage(args.source, args.repo, staging, args.base_model, args.base_revision, args.report, args.license)
    show(staging)
    for name in left_behind(args.source, staging):
        print(f"{'not published':>14}  {name}")
    if not args.yes:
        print("Nothing was uploaded; --yes uploads.")
        return
    done = upload(staging, args.repo, args.private, args.revision, args.pull_request, args.message)
    print(done.pr_url or done.commit_url)


if __name__ == "__main__":
    main()
