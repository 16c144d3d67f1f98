"""The training programs: what they train, on how many processes, and what is left when they are killed."""

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import peft
import pytest
import torch
import train_base
import train_sft
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import evaluation
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, TrlParser

from modeling_mmgpt import MMGPTForConditionalGeneration
from modeling_mmgpt.adapters_mmgpt import lora_config, new_token_rows, quantization_config
from modeling_mmgpt.speed.compiling import compile_parts
from modeling_mmgpt.training.checkpoints import one_run
from modeling_mmgpt.training.weights import decayed_weights
from processing_mmgpt import MMGPTCollator
from processing_mmgpt.evaluation.samples import reply


ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "tiny_world" / "base"
RESULTS = Path(__file__).with_name("results")
CONFIGS = ROOT / "examples" / "accelerate"
LIMIT = 120  # seconds, after which a run hangs

# Programs run in processes forked from one that has imported what they need: a run takes seconds, not ten of them.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train_sft", "train_base", "open_clip", Path(__file__).stem])
SERVER_PATH = os.pathsep.join(map(str, (ROOT, ROOT / "examples", ROOT / "tests")))


def run_program(program: str, arguments: list[str], environment: dict[str, str], log: str, prepare=None) -> None:
    """Run `main` of an example in this process; what it writes goes to `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.argv = [program, *arguments]
    importlib.import_module(program).main()


def start(log: Path, program: str, *arguments, processes: int = 1, prepare=None, config: str | None = None) -> list:
    """Start a program on so many processes, which find each other as under `torchrun`.

    The environment is that which `accelerate launch` makes of a file of `examples/accelerate`.
    """
    environment = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= launched(config, processes) if config else {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(processes):
        own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
        given = (program, [str(a) for a in arguments], own, f"{log}.{rank}", prepare)
        started.append(SERVER.Process(target=run_program, args=given))
        with mock.patch.dict(os.environ, PYTHONPATH=SERVER_PATH):  # Python 3.11 hands its server no `sys.path`
            started[-1].start()
    return started


def finish(log: Path, started: list) -> None:
    """Wait for processes that have to end well, and in time."""
    deadline = time.monotonic() + LIMIT
    for rank, process in enumerate(started):
        process.join(max(0, deadline - time.monotonic()))
        if process.exitcode != 0:
            for one in started:
                one.kill()
            pytest.fail(f"rank {rank} ended with {process.exitcode}:\n{Path(f'{log}.{rank}').read_text()[-3000:]}")


def run(log: Path, program: str, *arguments, **how) -> None:
    finish(log, start(log, program, *arguments, **how))


def launched(config: str, processes: int) -> dict[str, str]:
    """The environment that `accelerate launch` gives its processes by a config, in float32."""
    given = ["--config_file", str(CONFIGS / config), "--num_processes", str(processes), "--mixed_precision", "no"]
    given += ["--main_process_port", "0", "program"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    environment = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in environment.items() if key not in os.environ}


def asked(*content: dict, answer: str) -> list[dict]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_model, processor, picture):
    """A folder with a base whose dropout draws random numbers, and records with and without pictures by turns."""
    folder = tmp_path_factory.mktemp("world")
    make_model(text={"attention_dropout": 0.1}).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    lines = []
    for number in range(12):
        text = {"type": "text", "text": f"q{number}" * (1 + number % 3)}
        if number % 2 == 0:
            picture(number).save(folder / f"{number}.png")
            lines.append({"messages": asked({"type": "image"}, text, answer="yes"), "images": [f"{number}.png"]})
        else:
            lines.append({"messages": asked(text, answer=f"no {number}"), "images": []})
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    make_model().save_pretrained(folder / "still")  # without dropout
    processor.save_pretrained(folder / "still")
    for name, kept in (("pictures", lines[::2]), ("texts", lines[1::2])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
    pictures = {"reader": "messages", "files": [str(folder / "pictures.jsonl")], "image_root": str(folder)}
    turns = {"sources": [pictures, {"reader": "messages", "files": [str(folder / "texts.jsonl")]}]}
    (folder / "turns.yaml").write_text(json.dumps({**turns, "image_text_ratio": "1:1"}))
    source = {"reader": "messages", "files": [str(folder / "records.jsonl")], "image_root": str(folder)}
    (folder / "stream.yaml").write_text(json.dumps({"sources": [source], "streaming": True}))
    return folder


def options(world: Path, output: Path, base: str = "base", data: str = "records.jsonl", **others) -> list[str]:
    """Options of a short run of `train_sft` that logs every step."""
    given = {
        "model_name_or_path": world / base,
        "data": world / data,
        "output_dir": output,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "lora_r": 2,
        "activation_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **others,
    }
    return [piece for key, value in given.items() for piece in (f"--{key}", str(value))]


def history(output: Path) -> list[dict]:
    """What was logged, as the last checkpoint has it."""
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def losses(output: Path) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in history(output) if "loss" in entry]


def assert_same_run(one: Path, other: Path) -> None:
    """The same losses and the same weights, to the bit."""
    assert losses(one) == losses(other)
    weights, others = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert weights.keys() == others.keys() and all(torch.equal(weights[k], others[k]) for k in weights)


# Resume


def die_in_second_checkpoint() -> None:
    """Have this process kill itself while it writes its second checkpoint, when half of the files are there."""
    from transformers import Trainer

    save = Trainer._save_rng_state

    def save_or_die(self, output_dir):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    Trainer._save_rng_state = save_or_die


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(tmp_path, world):
    run(tmp_path / "log", "train_sft", *options(world, tmp_path / "whole"))
    killed = tmp_path / "killed"
    (process,) = start(
        tmp_path / "log", "train_sft", *options(world, killed, save_total_limit=1), prepare=die_in_second_checkpoint
    )
    process.join(LIMIT)
    assert process.exitcode == -signal.SIGKILL
    assert [path.parent.name for path in killed.glob("checkpoint-*/complete.json")] == ["checkpoint-2"]
    assert list((killed / "checkpoint-4").iterdir())
    run(tmp_path / "log", "train_sft", *options(world, killed, save_total_limit=1), "--resume")
    assert_same_run(tmp_path / "whole", killed)
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-6"]
    assert "checkpoint-4 is passed over" in (tmp_path / "log.0").read_text()


def test_a_spoiled_checkpoint_and_changed_data_are_said_where_a_run_goes_on(tmp_path, world):
    out, data = tmp_path / "out", tmp_path / "texts.jsonl"
    shutil.copy(world / "texts.jsonl", data)
    given = {"data": data, "max_steps": 4}
    run(tmp_path / "log", "train_sft", *options(world, out, **given))
    spoiled = out / "checkpoint-4" / "adapter_model.safetensors"
    content = bytearray(spoiled.read_bytes())
    content[-1] ^= 1
    spoiled.write_bytes(content)
    data.write_text(data.read_text().replace("no 1", "no 2"))
    run(tmp_path / "log", "train_sft", *options(world, out, **given), "--resume")
    said = (tmp_path / "log.0").read_text()
    assert f"{spoiled.parent} is passed over: {spoiled.name} has changed since it was written" in said
    assert f"{data} has changed since checkpoint-2 was written" in said
    assert bytes(content) != spoiled.read_bytes()  # written again


def test_a_second_run_in_a_folder_is_refused_before_it_loads_anything(tmp_path):
    with one_run(tmp_path / "out"):
        for program in ("train_sft", "train_base"):
            given = {"model_name_or_path": "nowhere"} if program == "train_sft" else {"vision": "no", "text": "no"}
            given |= {"data": "nowhere.jsonl", "output_dir": tmp_path / "out", "use_cpu": True, "report_to": "none"}
            pieces = [piece for key, value in given.items() for piece in (f"--{key}", str(value))]
            started = start(tmp_path / "log", program, *pieces, processes=2)
            for rank, process in enumerate(started):
                process.join(LIMIT)
                assert process.exitcode == 1
                said = f"OSError: Another run writes into {tmp_path / 'out'}: wait for its end, or give another"
                assert said in (tmp_path / f"log.{rank}").read_text().strip().splitlines()[-1]


def test_a_killed_stream_goes_on_with_the_rows_that_come_next(tmp_path, world):
    """Six steps of two rows are one pass over the stream; the run is killed in the second."""
    given = {"data": "stream.yaml", "max_steps": 8, "learning_rate": 1e-3}
    run(tmp_path / "log", "train_sft", *options(world, tmp_path / "whole", **given))
    assert losses(tmp_path / "whole")[6:] != losses(tmp_path / "whole")[:2]
    (process,) = start(tmp_path / "log", "train_sft", *options(world, tmp_path / "killed", **given))
    while not (tmp_path / "killed" / "checkpoint-6" / "complete.json").exists() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    run(tmp_path / "log", "train_sft", *options(world, tmp_path / "killed", **given), "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


KILLS = [("records.jsonl", 1)] * 8 + [("stream.yaml", 1)] * 4 + [("records.jsonl", 2)] * 6 + [("stream.yaml", 2)] * 2


@pytest.mark.bars
def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(tmp_path, world):
    """Twenty kills, at moments drawn from the length of a run: start, steps, checkpoints, end."""
    rng, wholes, report = random.Random(0), {}, []
    for number, (data, processes) in enumerate(KILLS):
        given = {"data": data, "learning_rate": 1e-3, "save_total_limit": 2}
        if (data, processes) not in wholes:
            wholes[data, processes] = tmp_path / f"whole-{number}"
            run(tmp_path / "log", "train_sft", *options(world, wholes[data, processes], **given), processes=processes)
            begin = time.monotonic()
            run(tmp_path / "log", "train_sft", *options(world, tmp_path / "timed", **given), processes=processes)
            seconds = time.monotonic() - begin
        killed, exits = tmp_path / f"killed-{number}", []
        while -signal.SIGKILL not in exits:  # a run that was too quick for its moment is no kill
            shutil.rmtree(killed, ignore_errors=True)
            begin, moment = time.monotonic(), rng.uniform(0, seconds)
            started = start(tmp_path / "log", "train_sft", *options(world, killed, **given), processes=processes)
            started[0].join(moment)
            for process in rng.sample(started, len(started)):
                process.kill()
            for process in started:
                process.join()
            exits = [process.exitcode for process in started]
            seconds = min(seconds, time.monotonic() - begin) if exits == [0] * processes else seconds
        left = sorted(path.name for path in killed.glob("*/")) if killed.exists() else []
        run(tmp_path / "log", "train_sft", *options(world, killed, **given), "--resume", processes=processes)
        assert_same_run(wholes[data, processes], killed)
        report.append({"data": data, "processes": processes, "after": round(moment, 2), "left": left})
    noted = evaluation.measured_with("pytest -m bars tests/test_train.py -k killed")
    noted |= {"kills": len(report), "equal to the bit": len(report), "runs": report}
    (RESULTS / "resume.json").write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n")


# Many processes


def shard_on_cpus() -> None:
    """Have accelerate shard on CPUs as well: 1.15 takes a config for FSDP there as one for DDP, and says nothing."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def sharded(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharded


TURNS = {"data": "turns.yaml", "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 1}
TURNS |= {"max_steps": 4, "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, world):
    """What one process makes of rows with pictures and rows without that take turns."""
    folder = tmp_path_factory.mktemp("one")
    given = options(world, folder / "out", "still", **TURNS, per_device_train_batch_size=2)
    run(folder / "log", "train_sft", *given)
    return folder / "out"


@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_one_without_pictures_are_one_process(tmp_path, world, one_process, config):
    """One of the two has all pictures and the other none, at every step."""
    prepare = shard_on_cpus if config == "fsdp2.yaml" else None
    given = options(world, tmp_path / "out", "still", **TURNS, per_device_train_batch_size=1)
    run(tmp_path / "log", "train_sft", *given, processes=2, config=config, prepare=prepare)
    assert losses(tmp_path / "out") == pytest.approx(losses(one_process), rel=1e-5)
    weights, others = (load_file(path / "adapter_model.safetensors") for path in (one_process, tmp_path / "out"))
    assert weights.keys() == others.keys()
    assert max((weights[key] - others[key]).abs().max().item() for key in weights) < 1e-5
    assert max(weights[key].abs().max().item() for key in weights if "lora_B" in key) > 1e-3


def test_packed_rows_train_as_rows_of_their_own(tmp_path, world, one_process):
    given = options(world, tmp_path / "out", "still", **TURNS, per_device_train_batch_size=2)
    run(tmp_path / "log", "train_sft", *given, "--packing", "true", "--max_length", "1024")
    assert losses(tmp_path / "out") == pytest.approx(losses(one_process), rel=1e-5)


@pytest.mark.bars
def test_a_sharded_run_shows_samples_and_resumes(tmp_path, world):
    """Replies are generated by all processes together, each with its part of the weights."""
    given = {"eval_data": world / "records.jsonl", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    how = {"processes": 2, "config": "fsdp2.yaml", "prepare": shard_on_cpus}
    run(tmp_path / "log", "train_sft", *options(world, tmp_path / "whole", **given), **how)
    assert any("prompt" in entry.get("eval_samples", "") for entry in history(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    run(tmp_path / "log", "train_sft", *options(world, tmp_path / "killed", **given), "--resume", **how)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_every_config_is_one_that_accelerate_reads():
    kinds = {path.name: load_config_from_file(str(path)).distributed_type for path in CONFIGS.glob("*.yaml")}
    assert kinds == {
        "one_gpu.yaml": "NO",
        "ddp.yaml": "MULTI_GPU",
        "fsdp2.yaml": "FSDP",
        "fsdp2_gathered.yaml": "FSDP",
        "several_hosts.yaml": "FSDP",
        "zero2.yaml": "DEEPSPEED",
        "zero3.yaml": "DEEPSPEED",
    }
    for name in ("fsdp2.yaml", "fsdp2_gathered.yaml", "several_hosts.yaml"):
        environment = launched(name, 16)
        assert environment["FSDP_RESHARD_AFTER_FORWARD"] == str("gathered" not in name).lower()
        assert environment["FSDP_VERSION"] == "2" and environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


def test_one_gpu_is_one_where_a_host_has_several():
    """Where a process sees several, the Trainer spreads each batch over them."""
    given = ["--config_file", str(CONFIGS / "one_gpu.yaml"), "program"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    assert environment["CUDA_VISIBLE_DEVICES"] == "0" and "LOCAL_RANK" not in environment


@pytest.mark.parametrize(
    ("asked", "way", "said"),
    [
        ({"new_tokens": True}, "FSDP", "new_tokens does not go with FSDP"),
        ({"new_tokens": True}, "ZeRO-3", "new_tokens does not go with ZeRO-3"),
        ({"cache_pictures": True}, "ZeRO-3", "cache_pictures does not go with ZeRO-3"),
        ({}, "DataParallel", "One process sees 2 GPUs"),
    ],
)
def test_what_does_not_go_together_is_refused_before_weights_are_loaded(tmp_path, monkeypatch, asked, way, said):
    config = launched_in(monkeypatch, way, SFTConfig(tmp_path, use_cpu=True, bf16=False))
    with pytest.raises(ValueError, match=said):
        train_sft.tune(train_sft.ScriptArguments("nowhere", Path("nowhere.jsonl"), **asked), config)


@pytest.mark.parametrize(
    ("asked", "way", "said"),
    [
        ({}, "ZeRO-2", "train_base.py does not go with ZeRO-2"),
        ({}, "ZeRO-3", "train_base.py does not go with ZeRO-3"),
        ({"lora_r": 2}, "FSDP", "lora_r of train_base.py does not go with FSDP"),
        ({}, "DataParallel", "One process sees 2 GPUs"),
    ],
)
def test_what_stage_one_cannot_do_is_refused_before_weights_are_loaded(tmp_path, monkeypatch, asked, way, said):
    config = launched_in(monkeypatch, way, TrainingArguments(tmp_path, use_cpu=True))
    with pytest.raises(ValueError, match=said):
        train_base.train(train_base.ScriptArguments("nowhere", "nowhere", Path("nowhere.jsonl"), **asked), config)


def launched_in(monkeypatch, way: str, config: TrainingArguments) -> TrainingArguments:
    """A config as processes have it that were launched in a way."""
    if way == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    elif way == "DataParallel":
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    else:
        config.deepspeed_plugin = SimpleNamespace(zero_stage=int(way[-1]))
    return config


# What is trained


@pytest.mark.parametrize("recipe", ["lora.yaml", "qlora.yaml"])
def test_every_key_of_a_recipe_is_an_option(recipe):
    parser = TrlParser((train_sft.ScriptArguments, SFTConfig))
    given = ["--config", f"examples/recipes/{recipe}", "--model_name_or_path", "base", "--bf16", "false"]
    script, config = parser.parse_args_and_config([*given, "--use_cpu", "true"])
    assert script.load_in_4bit == (recipe == "qlora.yaml") and config.max_length == 512
    assert script.data.is_file() and config.eval_strategy == "steps" and script.eval_rows == 512


def test_decay_is_for_the_matrices_of_the_gated_blocks(make_model):
    model = make_model()
    adapted = peft.get_peft_model(make_model(), lora_config(model))
    assert (
        len(decayed_weights(model)) == 2 * 5
    )  # two blocks: query, key and value, output, and two of the feed-forward
    for name in decayed_weights(model):
        assert ".gated_cross_attn_layer." in name and model.get_parameter(name).dim() == 2
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained & set(decayed_weights(adapted)) == {name for name in trained if ".gated_cross_attn_layer." in name}


def test_gates_have_a_learning_rate_of_their_own(make_model, tmp_path):
    model = make_model()
    given = {"learning_rate": 1e-4, "weight_decay": 0.1, "use_cpu": True, "report_to": "none"}
    trainer = train_base.BaseTrainer(model, TrainingArguments(tmp_path, **given))
    trainer.gate_learning_rate = 1e-2
    groups = trainer.create_optimizer().param_groups
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_gate = name.endswith("_gate")
        decay = 0.1 if name in decayed_weights(model) else 0.0
        assert rates[id(parameter)] == ((1e-2, 0.0) if is_gate else (1e-4, decay)), name
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(model.parameters()))


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.bars), True])
def test_compiled_parts_learn_the_same_from_any_number_of_pictures(make_model, ids, pixels, packed):
    rng = random.Random(0)
    losses, models = [], []
    torch.compiler.reset()
    for is_compiled in (False, True):
        model = make_model("llama", cross_attn_every_n_layers=1)
        model = peft.get_peft_model(model, lora_config(model, init_lora_weights=False)).train()
        if is_compiled:
            compile_parts(model, backend="eager")
        models.append(model)
    # Past its limit torch goes on uncompiled; here it fails. A block before every layer makes the most versions.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for number in [2, 0, 1, 3, *(rng.randint(0, 6) for _ in range(4))]:
            row = "#" * number + "abcdefgh" + "ijklmnop"[: 8 if packed else rng.randint(1, 8)]
            batch = ids(row.ljust(24, "q") if packed else row)
            if packed:
                batch["document_index"] = torch.tensor([[1] * 20 + [2] * 4])
            pictures = {"pixel_values": pixels(1, number)} if number else {}
            torch.manual_seed(0)
            results = [model(**batch, **pictures, labels=batch["input_ids"]).loss for model in models]
            for loss in results:
                loss.backward()
            losses.append([loss.item() for loss in results])
    assert all(one == pytest.approx(other, rel=1e-5) for one, other in losses)
    plain, compiled = (dict(model.named_parameters()) for model in models)
    assert all(
        torch.allclose(compiled[name].grad, weight.grad, rtol=1e-3, atol=1e-5)
        for name, weight in plain.items()
        if weight.requires_grad
    )


def test_a_model_compiled_for_training_replies_uncompiled(make_model, processor):
    model = make_model("llama")
    compile_parts(model, backend="eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    record = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}], "images": []}
    assert len(reply(model, processor, [record], 4)) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_tied_head_has_no_new_rows_of_its_own(make_model):
    embedding, head = "model.text_model.model.embed_tokens", "model.text_model.lm_head"
    assert new_token_rows(make_model()) == {embedding: [259, 258], head: [259, 258]}
    assert new_token_rows(make_model(text={"tie_word_embeddings": True})) == {embedding: [259, 258]}


def test_the_attention_of_the_lm_is_the_one_that_is_asked_for():
    given = {"model_name_or_path": str(BASE), "data": ROOT / "examples/records/records.jsonl"}
    model = train_sft.load_model(train_sft.ScriptArguments(**given, attn_implementation="eager"))
    assert model.model.text_model.config._attn_implementation == "eager"
    assert train_sft.load_model(train_sft.ScriptArguments(**given)).config.text_config._attn_implementation == "sdpa"


def test_an_adapter_of_a_filled_vocabulary_is_one_over_the_base_as_it_was(tmp_path):
    given = {"model_name_or_path": str(BASE), "data": ROOT / "examples/records/records.jsonl"}
    model = train_sft.load_model(train_sft.ScriptArguments(**given, fill_vocabulary=True)).float()
    text = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    adapted = peft.get_peft_model(model, lora_config(model))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        filled = adapted(**text).logits
    adapted.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    size = loaded.config.text_config.vocab_size
    assert size % 64 and filled.shape[-1] % 64 == 0
    torch.testing.assert_close(loaded(**text).logits, filled[..., :size], rtol=0, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_not_gone_on_with(tmp_path, world):
    base = AutoModelForImageTextToText.from_pretrained(world / "still")
    smaller = lora_config(base).target_modules
    peft.get_peft_model(base, lora_config(base, language_mlp=True)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": smaller}))
    script = train_sft.ScriptArguments(str(tmp_path), world / "records.jsonl")
    with pytest.raises(ValueError, match=r"weights are 24 left over, first \['\S*mlp.down_proj.lora_A"):
        train_sft.load_model(script)


def test_an_adapter_goes_on_where_it_was_and_evaluation_is_shown(tmp_path, world):
    """The loss an adapter ended with is the one it starts with; of all weights, only its own change."""
    watched = {"eval_data": world / "records.jsonl", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    watched |= {"samples": 2, "report_to": "tensorboard"}
    first, second = tmp_path / "first", tmp_path / "second"
    run(tmp_path / "log", "train_sft", *options(world, first, "still", **watched, new_tokens=True))
    given = options(world, second, eval_on_start=True, **watched)
    given[given.index("--model_name_or_path") + 1] = str(first)
    run(tmp_path / "log", "train_sft", *given)
    ended, started = (
        [entry["eval_loss"] for entry in history(path) if "eval_loss" in entry][at]
        for path, at in ((first, -1), (second, 0))
    )
    assert started == pytest.approx(ended, abs=1e-5)
    weights, moved = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    assert weights.keys() == moved.keys() and not any(torch.equal(weights[key], moved[key]) for key in weights)
    base = load_file(world / "still" / "model.safetensors")
    rows = [name for name in weights if "trainable_tokens_delta" in name]
    assert len(rows) == 2  # of the embedding, and of the head, which TRL reads past PEFT's wrapper
    for name in rows:
        part = name.removeprefix("base_model.model.").split(".token_adapter")[0]
        change = (weights[name] - base[f"{part}.weight"][[259, 258]]).abs().amax(dim=1)
        # No dialogue holds <|endofchunk|>: its row of the head is pushed down, that of the embedding stays.
        assert (change > 1e-4).tolist() == [True, part.endswith("lm_head")]
    assert json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == str(world / "still")
    events = EventAccumulator(str(next((first / "runs").iterdir()))).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    (table, *_) = events.Tensors("eval/samples/text_summary")
    assert table.tensor_proto.string_val[0].decode().count("\n") == 3  # head, rule, two rows


def said(role: str, text: str = "", images: int = 0) -> dict:
    parts = [{"type": "image"}] * images + ([{"type": "text", "text": text}] if text else [])
    return {"role": role, "content": parts}


@pytest.mark.parametrize(
    ("messages", "drawn"),
    [
        ([said("user", images=1), said("assistant", "A cat.")], "^@«A cat.%»"),
        ([said("user", images=1), said("assistant", "a")] * 2, "^@«a%»@«a%»"),
        ([said("user", "Given"), said("user", images=2), said("assistant", "a")], "^Given@@«a%»"),
        ([said("user", images=1), said("assistant", "a"), said("user", "b")], "^@«a%»b"),
    ],
)
def test_of_a_document_the_text_behind_pictures_is_learnt(processor, draw, picture, messages, drawn):
    pictures = [picture(number) for number in range(drawn.count("@"))]
    batch = MMGPTCollator(processor, template=train_base.DOCUMENT)([{"messages": messages, "images": pictures}])
    assert draw(batch["input_ids"][0], batch["labels"][0] != -100) == drawn
    assert batch["pixel_values"].shape[:2] == (1, len(pictures))


@pytest.fixture
def stage_one(tmp_path, make_model, make_lm, base_tokenizer, picture):
    """Options of a short run of `train_base` on tiny parts in `tmp_path`."""
    lm = make_lm(make_model(text={"pad_token_id": None}))
    lm.resize_token_embeddings(258)
    for part in (lm, base_tokenizer):
        part.save_pretrained(tmp_path / "lm")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=24, patch_size=8)).save_pretrained(tmp_path / "tower")
    lines = []
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
        seen = {"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": f"It is {number}."}
        lines.append({"messages": [*seen, *seen], "images": [f"{number}.png"] * 2})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    given = {"vision": tmp_path / "tower", "text": tmp_path / "lm", "data": tmp_path / "data.jsonl"}
    given |= {"output_dir": tmp_path / "base", "cross_attn_every_n_layers": 2, "max_steps": 3, "learning_rate": 1e-2}
    given |= {"use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2, "weight_decay": 0.1}
    return given


def train_base_with(tmp_path, given, **how):
    arguments = [piece for key, value in given.items() for piece in (f"--{key}", str(value))]
    run(tmp_path / "log", "train_base", *arguments, **how)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.bars)])
def test_stage_one_trains_what_is_new_and_nothing_else(tmp_path, stage_one, processes):
    train_base_with(tmp_path, stage_one, processes=processes)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    assert processor.image_token_id == model.config.image_token_id == 259
    set_seed(42)  # the default of the program
    fresh = MMGPTForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "tower"), str(tmp_path / "lm"), cross_attn_every_n_layers=2
    )
    assert all(
        module.attn_gate != 0 for name, module in model.named_modules() if name.endswith("gated_cross_attn_layer")
    )
    for name, weight in model.model.text_model.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(weight[:258], lm.state_dict()[name]) and weight.shape[0] == 261
            changed = (weight != fresh.model.text_model.state_dict()[name])[258:].any(dim=1)
            assert changed.tolist() == [True, True, False]  # <|endofchunk|>, <image>, padding
        elif "gated_cross_attn_layer" not in name:
            assert torch.equal(weight, lm.state_dict()[name.replace("decoder_layer.", "")]), name
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, fresh.model.vision_tower.state_dict()[name]), name


def test_label_smoothing_smooths_the_labels_that_are_learnt(tmp_path, stage_one):
    for factor in (0.0, 1e-6):
        given = {"max_steps": 1, "logging_steps": 1, "save_steps": 1, "output_dir": tmp_path / str(factor)}
        train_base_with(tmp_path, stage_one | given | {"label_smoothing_factor": factor})
    plain, smoothed = (losses(tmp_path / str(factor))[0] for factor in (0.0, 1e-6))
    assert abs(plain - smoothed) < 1e-3


@pytest.mark.bars
def test_accelerate_launches_two_processes(tmp_path, world):
    """The commands of the docs, on CPUs."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml")]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    given = options(world, tmp_path / "out", "still", **TURNS, per_device_train_batch_size=1)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, "examples/train_sft.py", *given]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "out")) == 4


@pytest.mark.bars
def test_qlora_keeps_tower_resampler_and_head_whole_and_learns(tmp_path):
    """Real 4-bit matrices, by bitsandbytes; rows of fewer than 128 numbers are none of its business."""
    pytest.importorskip("bitsandbytes")
    four_bits = quantization_config("nf4", torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(BASE, quantization_config=four_bits)
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantized == {
        name for name in linear if name.startswith("model.text_model.") and not name.endswith("lm_head")
    }
    given = {"data": ROOT / "examples/records/records.jsonl", "load_in_4bit": True, "max_steps": 8}
    given |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8}
    run(tmp_path / "log", "train_sft", *options(BASE.parent, tmp_path / "out", **given))
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    assert list(AutoModelForImageTextToText.from_pretrained(tmp_path / "out").peft_config) == ["default"]
