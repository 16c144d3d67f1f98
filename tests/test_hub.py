"""Push and load through the real client and a Hub on this machine; loaded in processes without our packages."""

import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from loopback_hub import TOKEN, LoopbackHub
from tiny_world.evaluation import measured_with
from transformers import AutoModelForImageTextToText, AutoProcessor

import push_to_hub


ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "tiny_world" / "base"
RESULTS = Path(__file__).with_name("results") / "hub.json"
# Several pushes by one process: most of its time goes into imports.
PUSHES = """
import json, runpy, sys
program, pushes = sys.argv[1:]
for arguments in json.loads(pushes):
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
"""


def run(hub: LoopbackHub, home: Path, *command: str | Path, check: bool = True, **environment: str):
    done = subprocess.run(
        [sys.executable, "-P", *map(str, command)],
        cwd=home,
        env=hub.environment(home, **environment),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def push(hub: LoopbackHub, home: Path, *pushes: list[str | Path], check: bool = True):
    pushes = [[*map(str, arguments), "--staging", str(home / "staged"), "--yes"] for arguments in pushes]
    program = ["-c", PUSHES, ROOT / "push_to_hub.py", json.dumps(pushes)]
    return run(hub, home, *program, check=check, PYTHONPATH=str(ROOT))


def through(
    hub: LoopbackHub, home: Path, repo: str, kind: str, packages: str, scene: Path, *doors: str, **environment
):
    """What comes out of the doors of doors.py."""
    if packages == "with":
        environment["PYTHONPATH"] = str(ROOT)
    done = run(hub, home, ROOT / "tests" / "doors.py", repo, kind, packages, scene, *doors, **environment)
    return json.loads(done.stdout.split("ANSWERS ")[1])


def ask_here(folder: Path, scene: Path, **options) -> list[int]:
    """The ids that a local folder writes, asked as doors.py asks."""
    options = {"dtype": torch.float32, **options}
    model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "path": str(scene)}, {"type": "text", "text": "What colour is it?"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    return model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def in_folder(folder: Path) -> dict[str, str]:
    return hashes({file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()})


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def adapters(adapter, make_adapter, tmp_path_factory) -> list[Path]:
    return [adapter, make_adapter(BASE, tmp_path_factory.mktemp("second"), seed=1)]


@pytest.fixture(scope="module")
def hub(adapters, home):
    """A Hub with an adapter pushed twice, as a pull request, to a branch and privately; the last push is refused."""
    with LoopbackHub() as hub:
        first, second = adapters
        repo = "someone/adapter"
        hub.last = push(
            hub,
            home,
            [first, repo],
            [first, repo, "--revision", "try"],
            [second, repo, "--pull-request"],
            [first, "someone/hidden", "--private"],
            [second, "someone/hidden", "--private", "--base-model", "someone/base", "--license", "apache-2.0"],
            [second, repo],
            [first, repo, "--private"],
            check=False,
        )
        refs = hub.repos[repo].refs
        refs["refs/tags/first"] = refs["refs/heads/try"]
        yield hub


def test_a_push_is_one_commit_of_what_is_staged(hub, adapters, home, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = hub.repos["someone/adapter"]
    pushed = repo.commits[repo.resolve("main")]
    push_to_hub.stage(adapters[1], "someone/adapter", tmp_path / "staged")
    assert hashes(pushed) == in_folder(tmp_path / "staged")
    assert hashes(repo.commits[repo.resolve("refs/pr/1")]) == hashes(pushed)
    assert repo.commits[repo.resolve("try")]["adapter_model.safetensors"] != pushed["adapter_model.safetensors"]
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "someone/adapter"
    assert not any(str(ROOT).encode() in content for content in pushed.values())


def test_files_of_an_earlier_push_go_in_the_same_commit(hub):
    repo = hub.repos["someone/hidden"]
    before, after = (repo.commits[sha] for sha in (repo.log[repo.resolve("main")]["parent"], repo.resolve("main")))
    assert before.keys() - after.keys() == {"config.json", "generation_config.json", "model.safetensors"}


def test_what_did_not_change_is_not_sent_again(hub):
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert len(sent) == len(set(sent)) == 3  # the base and two adapters, in six pushes that were let in


def test_what_was_pushed_answers_without_our_packages_and_the_old_revision_too(hub, home, adapters, scene):
    doors = ("auto_model_for_image_text_to_text", "pinned_revision")
    old, new = (ask_here(folder, scene) for folder in adapters)
    assert old != new
    answers = through(hub, home, "someone/adapter", "without", scene, *doors)
    assert answers == {doors[0]: new, doors[1]: old}


def test_hf_download_brings_a_revision_and_refuses_a_stranger_a_private_one(hub, home, tmp_path):
    command = ["-m", "huggingface_hub.cli.hf", "download"]
    run(hub, home, *command, "someone/adapter", "--revision", "first", "--local-dir", tmp_path / "first")
    repo = hub.repos["someone/adapter"]
    assert in_folder(tmp_path / "first") == hashes(repo.commits[repo.resolve("first")])
    assert hub.repos["someone/hidden"].private
    done = run(hub, home, *command, "someone/hidden", "--local-dir", tmp_path / "no", check=False, HF_TOKEN="hf_no")
    assert done.returncode != 0 and TOKEN not in done.stderr


def test_a_private_push_to_a_public_repository_is_refused(hub):
    assert hub.last.returncode != 0 and "is public: nothing was uploaded" in hub.last.stderr
    assert (
        len(hub.repos["someone/adapter"].log) == 4
    )  # the empty one, main twice, pull request; the branch has nothing new


# The bars


def note(**figures) -> None:
    """Keep the last figures of these bars, with what they were measured with."""
    noted = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    noted |= measured_with("pytest -m bars tests/test_hub.py tests/test_doors.py tests/test_merge.py") | figures
    RESULTS.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n")


@pytest.mark.bars
def test_trained_pushed_and_loaded_elsewhere_gives_the_same_tokens(tmp_path, scene):
    command = [ROOT / "examples" / "train_sft.py", "--model_name_or_path", BASE, "--output_dir", tmp_path / "adapter"]
    command += ["--data", ROOT / "examples" / "records" / "records.jsonl", "--learning_rate", "1e-2"]
    command += ["--max_steps", "10", "--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu"]
    with LoopbackHub() as hub:
        run(hub, tmp_path, *command, PYTHONPATH=str(ROOT))
        here = ask_here(tmp_path / "adapter", scene)
        assert here != ask_here(BASE, scene)
        push(hub, tmp_path, [tmp_path / "adapter", "user/adapter"])
        door = "auto_model_for_image_text_to_text"
        there = through(hub, tmp_path, "user/adapter", "without", scene, door)
    assert there == {door: here}
    note(trained_pushed_loaded={"steps": 10, "tokens_equal": len(here)})


@pytest.mark.bars
def test_an_upload_cut_off_at_a_random_byte_leaves_nothing_and_its_repetition_succeeds(adapters, tmp_path):
    first, second = adapters
    cases, rng = 20, random.Random(0)
    with LoopbackHub() as hub:
        push(hub, tmp_path, [first, "someone/adapter"])
        total, repo, good = hub.received, hub.repos["someone/adapter"], []
        commit = total - sum(map(len, hub.objects.values()))
        for case in range(cases):
            # The body of the commit is 3 % of all bytes; every fourth case falls into it.
            cut = rng.randrange(total - commit, total) if case % 4 == 3 else rng.randrange(1, total)
            hub.mend()
            hub.objects.clear()
            name = f"someone/adapter-{case}"
            _push_until_cut(hub, tmp_path, second, name, cut, dead=case % 2 == 0)
            seen = hub.repos[name].commits.values() if name in hub.repos else ()
            whole = in_folder(tmp_path / "staged")
            assert all(not files or hashes(files) == whole for files in seen), cut
            hub.mend()
            push(hub, tmp_path, [second, name])
            found = hub.repos[name].commits[hub.repos[name].resolve("main")]
            assert hashes(found) == in_folder(tmp_path / "staged"), cut
            good.append(cut)
    assert repo.resolve("main") in repo.commits
    note(cut_off={"cases": cases, "good": len(good), "bytes_of_an_upload": total, "cut_after_bytes": good})


def _push_until_cut(hub: LoopbackHub, home: Path, source: Path, name: str, cut: int, dead: bool) -> None:
    """Push, and lose the line after `cut` bytes: for good, until the push is killed, or for one connection."""
    hub.cut_after = cut
    arguments = [str(source), name, "--staging", str(home / "staged"), "--yes"]
    process = subprocess.Popen(
        [sys.executable, "-P", str(ROOT / "push_to_hub.py"), *arguments],
        cwd=home,
        env=hub.environment(home, PYTHONPATH=str(ROOT)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert hub.is_cut.wait(timeout=300)
    if dead:
        time.sleep(1.5)  # the client tries again, in vain
        process.kill()
    else:
        time.sleep(0.2)
        hub.mend()
    process.wait(timeout=300)
