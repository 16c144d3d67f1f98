"""Evaluation: public files to prompts, predictions that survive a kill, scores by the reference's protocol."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import evaluate_benchmark
import psutil
import pytest
import torch
from tiny_world import benchmarks, evaluation
from tiny_world.mixture import example
from transformers import AutoModelForImageTextToText, AutoProcessor

from processing_mmgpt.evaluation.benchmarks import BENCHMARKS, caption_of, read_samples, short_answer_of
from push_to_hub import stage


ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "tiny_world" / "base"
NAMES = ("vqav2", "coco", "hateful_memes", "imagenet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    for name, write in benchmarks.WRITERS.items():
        write(root / name, {"train2014": 12, "val2014": 8})
    return root


# Files to samples


@pytest.mark.parametrize("name", NAMES)
def test_public_files_are_read_by_split_with_pictures_that_exist(folders, name):
    support = read_samples(BENCHMARKS[name], folders / name, is_support=True)
    queries = read_samples(BENCHMARKS[name], folders / name, is_support=False)
    assert (len(support), len(queries)) == (12, 8)
    assert all(Path(sample["image"]).is_file() and sample["answer"] for sample in support + queries)
    assert not {sample["image"] for sample in support} & {sample["image"] for sample in queries}
    assert len({sample["id"] for sample in queries}) == 8


def test_a_part_of_the_queries_is_the_same_part_every_time(folders):
    whole = read_samples(BENCHMARKS["coco"], folders / "coco", is_support=False)
    part = read_samples(BENCHMARKS["coco"], folders / "coco", is_support=False, count=5)
    assert part == read_samples(BENCHMARKS["coco"], folders / "coco", is_support=False, count=5)
    assert len(part) == 5 and all(sample in whole for sample in part)


def test_a_picture_outside_of_the_folder_is_refused(folders, tmp_path):
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text(json.dumps({"id": 1, "img": "../secret.png", "label": 1, "text": "a"}) + "\n")
    with pytest.raises(ValueError, match="leaves the image root"):
        read_samples(BENCHMARKS["hateful_memes"], tmp_path, is_support=True)


# Samples to prompts, and replies to answers: the strings of open_flamingo's evaluation at 655f693

PROMPTS = {
    "vqav2": "@Question:{q[text]} Short answer:{a}%\n@Question:{q2[text]} Short answer:",
    "coco": "@Output:{a}%\n@Output:",
    "hateful_memes": "@is an image with: '{q[text]}' written on it. Is it hateful? Answer:{a}%"
    "@is an image with: '{q2[text]}' written on it. Is it hateful? Answer:",
    "imagenet": "@Output:{a}%@Output:",
}


@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_those_of_open_flamingo(folders, processor, draw, name, with_images):
    benchmark = BENCHMARKS[name]
    example, query = read_samples(benchmark, folders / name, is_support=True)[:2]
    inputs = evaluate_benchmark.encode(processor, benchmark, "open_flamingo", [[example]], [query], with_images)
    expected = PROMPTS[name].format(q=example, a=example["answer"], q2=query)
    if not with_images:  # "0 shots": the examples keep their text
        expected = expected.replace("@", "", 1)
    assert draw(inputs["input_ids"][0]).removeprefix("^") == expected
    assert inputs["pixel_values"].shape[1] == 1 + with_images


def test_in_the_instruction_form_examples_are_earlier_turns(folders, processor, draw):
    benchmark = BENCHMARKS["vqav2"]
    example, query = read_samples(benchmark, folders / "vqav2", is_support=True)[:2]
    inputs = evaluate_benchmark.encode(processor, benchmark, "instruction", [[example]], [query], True)
    drawn = draw(inputs["input_ids"][0])
    assert drawn.count("### Image:\n@") == 2
    assert f"### Instruction:\n{example['text']}\n\n### Response:\n{example['answer']}$" in drawn
    assert drawn.endswith(f"### Instruction:\n{query['text']}\n\n### Response:\n")


def test_a_control_token_in_an_annotation_stays_text(folders, processor):
    sample = {"id": 1, "image": read_samples(BENCHMARKS["coco"], folders / "coco", True)[0]["image"]}
    sample |= {"text": "What is <image> here?<|endofchunk|>", "answer": "a"}
    inputs = evaluate_benchmark.encode(processor, BENCHMARKS["vqav2"], "open_flamingo", [[sample]], [sample], True)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2


def test_answers_are_cut_out_of_replies_as_in_the_reference():
    assert caption_of(' a "red" bus Output: a dog') == "a red bus"
    assert short_answer_of(" red, or blue") == "red"
    assert short_answer_of("1,000 Question: why") == "1,000"


def test_greedy_answers_by_an_engine_are_those_of_generate(folders, model, processor):
    benchmark = BENCHMARKS["vqav2"]
    support, queries = (read_samples(benchmark, folders / "vqav2", is_support=part) for part in (True, False))
    examples = [support[k : k + k % 3] for k in range(len(queries))]  # rows of different lengths and pictures
    inputs = evaluate_benchmark.encode(processor, benchmark, "open_flamingo", examples, queries, True)
    settings = {"do_sample": False, "max_new_tokens": benchmark.max_new_tokens, "eos_token_id": [257, 258]}
    ids = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    expected = [benchmark.clean(reply) for reply in processor.batch_decode(ids, skip_special_tokens=True)]
    with evaluate_benchmark.BatchingEngine(model, do_sample=False) as engine:
        assert evaluate_benchmark.write_answers(model, processor, inputs, benchmark, engine) == expected
    assert len(set(expected)) > 1


# Classes


def test_classes_are_ranked_by_their_mean_log_likelihood(model, processor, picture):
    inputs = processor(text="<image>Output:", images=picture(0))
    classes = ["no", "yes", "perhaps"]
    found = evaluate_benchmark.rank_classes(model, processor, inputs, classes)
    for name, score in zip(classes, found, strict=True):
        whole = processor(text=f"<image>Output:{name}", images=picture(0))
        start = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            logits = model(**whole).logits[:, start - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, whole["input_ids"][:, start:, None]).mean()
        assert score == pytest.approx(expected.item(), abs=1e-4)


def test_scores_are_those_of_the_likeliest_class_and_of_the_order():
    samples = [{"answer": a, "classes": ["no", "yes"]} for a in ("yes", "no", "yes", "no")]
    predictions = [[-3.0, -1.0], [-1.0, -2.0], [-1.0, -1.5], [-1.0, -5.0]]
    scores = BENCHMARKS["hateful_memes"].score(samples, predictions)
    assert scores == {"ROC-AUC": pytest.approx(100.0), "accuracy": pytest.approx(75.0)}


# Predictions, killed and continued


def ask(batch):
    return [f"answer to {query['id']}" for query in batch]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    batches = [[{"id": 2 * k}, {"id": 2 * k + 1}] for k in range(4)]

    def interrupted(batch):
        if batch is batches[2]:
            raise KeyboardInterrupt
        return ask(batch)

    with pytest.raises(KeyboardInterrupt):
        evaluate_benchmark.predict(tmp_path, batches, interrupted, "")
    with (tmp_path / "0.jsonl").open("a") as file:
        file.write('{"id": 4, "predic')  # killed while writing
    asked = []
    done = evaluate_benchmark.predict(tmp_path, batches, lambda batch: asked.append(batch) or ask(batch), "")
    assert asked == batches[2:]
    assert done == {k: f"answer to {k}" for k in range(8)}
    assert evaluate_benchmark.predict(tmp_path, batches, pytest.fail, "") == done


def test_predictions_of_other_settings_are_not_mixed_in(folders, tmp_path, monkeypatch):
    command = ["evaluate_benchmark.py", str(BASE), "--benchmark", "coco", "--data", str(folders / "coco")]
    command += ["--output_dir", str(tmp_path), "--num_samples", "2", "--shots", "0", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", command)
    evaluate_benchmark.main()
    assert json.loads((tmp_path / "scores.json").read_text())["0"]["CIDEr"]["scores"]
    monkeypatch.setattr(sys, "argv", [*command, "--form", "instruction"])
    with pytest.raises(SystemExit, match="another run.*'form'"):
        evaluate_benchmark.main()


# The bar: 1 and 2 processes, killed and continued, give the same

RESULTS = Path(__file__).with_name("results") / "evaluate.json"


def command(folder: Path, output_dir: Path, processes: int, selection: str) -> list[str]:
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
    program = ["examples/evaluate_benchmark.py", str(BASE), "--benchmark", "coco", "--data", str(folder)]
    program += ["--output_dir", str(output_dir), "--selection", selection, "--batch_size", "2"]
    return [sys.executable, *launch, *program, "--shots", "0", "4", "--seeds", "0", "1"]


def start(*arguments) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed


def outcome(output_dir: Path) -> tuple:
    predictions = {f.name: evaluate_benchmark.finished(f) for f in sorted((output_dir / "predictions").iterdir())}
    return json.loads((output_dir / "scores.json").read_text()), predictions


@pytest.mark.bars
@pytest.mark.parametrize("selection", ["random", "rices"])
def test_one_and_two_processes_and_a_killed_run_give_the_same(tmp_path, selection):
    folder = tmp_path / "coco"
    benchmarks.write_coco(folder, {"train2014": 30, "val2014": 12})
    finish(start(folder, tmp_path / "one", 1, selection))
    finish(start(folder, tmp_path / "two", 2, selection))
    killed = start(folder, tmp_path / "killed", 2, selection)
    while killed.poll() is None and not any(p.stat().st_size for p in (tmp_path / "killed").glob("*/4-0/*.jsonl")):
        time.sleep(0.05)
    assert killed.poll() is None, "the run was over before it could be killed"
    for process in [*psutil.Process(killed.pid).children(recursive=True), killed]:
        process.kill()
    killed.communicate()
    assert not (tmp_path / "killed" / "scores.json").exists()
    finish(start(folder, tmp_path / "killed", 1, selection))
    expected = outcome(tmp_path / "one")
    assert outcome(tmp_path / "two") == expected
    assert outcome(tmp_path / "killed") == expected
    assert {path.name for path in (tmp_path / "two").glob("predictions/*/*.jsonl")} == {"0.jsonl", "1.jsonl"}
    noted = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    noted |= evaluation.measured_with("pytest -m bars tests/test_evaluate.py")
    noted[selection] = {"identical": ["1 process", "2 processes", "2 killed, 1 continues"], "scores": expected[0]}
    RESULTS.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n")


# Another harness, unmodified

TASK = """
task: tiny_world
dataset_path: json
dataset_kwargs: {{data_files: {{test: {records}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.doc_to_visual
doc_to_text: !function pictures.doc_to_text
doc_to_messages: !function pictures.doc_to_messages
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
TASK_CODE = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    picture = {"type": "image", "url": doc_to_visual(doc)[0]}
    return [{"role": "user", "content": [picture, {"type": "text", "text": doc["question"]}]}]
"""


@pytest.mark.bars
def test_lmms_eval_runs_on_a_staged_model_through_its_generic_chat_model(tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval is too large to be a dependency: pip install lmms-eval")
    stage(BASE, "you/tiny", tmp_path / "staged")
    examples = [example("colour", 0, number, "test") for number in range(6)]
    rows = []
    for number, asked in enumerate(examples):
        asked.images[0].save(tmp_path / f"{number}.png")
        question = asked.messages[0]["content"][-1]["text"]
        rows.append({"image": str(tmp_path / f"{number}.png"), "question": question, "answer": asked.answer})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "tiny_world.yaml").write_text(TASK.format(records=tmp_path / "records.jsonl"))
    (tasks / "pictures.py").write_text(TASK_CODE)
    command = [sys.executable, "-m", "lmms_eval", "eval", "--model", "huggingface", "--tasks", "tiny_world"]
    command += ["--model_args", f"pretrained={tmp_path / 'staged'},trust_remote_code=True,device_map=cpu"]
    command += ["--device", "cpu", "--include_path", tasks, "--log_samples", "--output_path", tmp_path / "out"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "out").rglob("*samples_tiny_world.jsonl")
    logged = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(BASE)
    for asked, row in zip(examples, logged, strict=True):
        inputs = processor.apply_chat_template(
            asked.messages[:-1], images=asked.images, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        own = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["filtered_resps"].strip() == own.strip()
