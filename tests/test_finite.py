"""Steps that are not finite: skipped, counted, named, and a few of them end the run."""

import itertools

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_mmgpt.training.finite import FiniteSteps
from processing_mmgpt import MMGPTCollator


class FiniteTrainer(FiniteSteps, Trainer):
    """What the training programs mix."""


@pytest.fixture
def run(tmp_path, make_model, processor, picture):
    """Train a tiny model for some steps, and spoil what a test says: `run(steps, spoil, **arguments)`."""

    def train(steps, spoil=None, **arguments):
        model = make_model()
        rows = [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                    {"role": "assistant", "content": f"It is {number}."},
                ],
                "images": [picture(number)],
            }
            for number in range(8)
        ]
        collate = MMGPTCollator(processor)
        trainer = FiniteTrainer(
            model=model,
            args=TrainingArguments(
                tmp_path / "out",
                max_steps=steps,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                weight_decay=0.1,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                remove_unused_columns=False,
                logging_nan_inf_filter=False,
                **arguments,
            ),
            train_dataset=rows,
            data_collator=lambda own: spoil_batch(next(numbers), collate(own)),
        )
        numbers, spoil_batch = itertools.count(), (spoil or {}).get("batch", lambda _, batch: batch)
        trainer.states = []
        forward = model.forward

        def noted(*args, **kwargs):
            trainer.states.append({name: p.detach().clone() for name, p in model.named_parameters()})
            return forward(*args, **kwargs)

        model.forward = noted
        if spoil and "gradient" in spoil:
            weight = model.get_parameter(spoil["gradient"])
            weight.register_hook(lambda g: g * float("nan") if trainer.state.global_step in spoil["steps"] else g)
        return trainer

    return train


GATED = "model.text_model.model.layers.1.gated_cross_attn_layer.attn.to_q.weight"


def at(batches, change):
    """Spoil these batches, counted from 0."""
    return lambda number, batch: change(batch) if number in batches else batch


def spoil_picture(batch):
    batch["pixel_values"][1, 0, 0, 0, 0] = float("nan")
    return batch


@pytest.fixture
def said(monkeypatch):
    """What is warned of."""
    warned = []
    monkeypatch.setattr("modeling_mmgpt.training.finite.logger.warning", warned.append)
    return warned


def test_a_step_with_one_bad_gradient_changes_nothing_and_is_named(run, said):
    trainer = run(4, {"gradient": GATED, "steps": [1]})
    trainer.train()
    assert f"Skipped step 2: gradients are not finite in 1 of 115 tensors, first ['{GATED}']" in said[0]
    first, second, third, fourth = trainer.states
    assert all(torch.equal(second[name], third[name]) for name in second)  # no move, no decay
    assert not torch.equal(first[GATED], second[GATED]) and not torch.equal(third[GATED], fourth[GATED])
    assert trainer.skipped == 1 and trainer.skipped_in_a_row == 0
    assert {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()} == {3}
    (entry,) = [entry for entry in trainer.state.log_history if "skipped_steps" in entry]
    assert entry["skipped_steps"] == 1 and entry["skipped_loss"] > 0
    assert all(entry["loss"] == entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_bad_picture_is_skipped_and_its_row_named(run, said, accumulated):
    trainer = run(3, {"batch": at([accumulated], spoil_picture)}, gradient_accumulation_steps=accumulated)
    trainer.train()
    assert trainer.skipped == 1
    assert "Skipped step 2: gradients are not finite in" in said[0] and "the loss is nan" in said[0]
    assert ("pixel_values of the last batch is not finite in the rows [1]" in said[0]) == (accumulated == 1)
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_a_label_outside_of_the_vocabulary_does_not_pass_for_a_step(run):
    """Cross-entropy refuses it by itself; a loss that is not finite would be skipped."""

    def spoil(batch):
        batch["labels"][0, -2] = 100_000
        return batch

    with pytest.raises((IndexError, RuntimeError)):
        run(2, {"batch": at([1], spoil)}).train()


def test_a_few_in_a_row_end_the_run_with_what_to_do(run):
    trainer = run(9, {"batch": at([2, 3, 4, 5, 6, 7], spoil_picture)})
    with pytest.raises(FloatingPointError, match="5 steps in a row were skipped, the last of them step 7") as raised:
        trainer.train()
    assert "lower the learning rates" in str(raised.value)
    assert all(torch.equal(trainer.states[2][name], weight) for name, weight in trainer.model.named_parameters())


def test_others_between_them_begin_the_count_anew(run):
    trainer = run(8, {"batch": at([0, 1, 2, 4, 5, 6], spoil_picture)})
    trainer.patience = 4
    trainer.train()
    assert trainer.skipped == 6 and trainer.skipped_in_a_row == 0


def test_a_spoilt_weight_ends_the_run_at_once(run):
    trainer = run(3)
    with torch.no_grad():
        trainer.model.get_parameter(GATED)[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"1 weights are not finite, first .*to_q.weight"):
        trainer.train()
