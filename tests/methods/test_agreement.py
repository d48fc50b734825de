"""Our loop against transformers' Trainer: LoRA on a tiny BERT, the same rows in the same order, the same losses."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from harness.contracts.subject import CPU, method_of, task_of
from harness.run.streams import TrainingData
from harness.run.training import Training
from harness.spec import TrainSpec
from harness.splits import make_splits

UPDATES, BATCH = 12, 8
RANK, ALPHA, DROPOUT, DECAY, RATE, CLIP, WARMUP = 4, 8.0, 0.1, 0.05, 5e-3, 0.3, 3
TOLERANCE = 1e-5


class RecordingTrainer(Trainer):
    """Trains on the rows as they come and keeps every loss. Dropout is seeded by the update, as on our side."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.losses, self.norms = [], []

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, *arguments, **settings):
        torch.manual_seed(self.state.global_step)
        loss = super().compute_loss(model, inputs, *arguments, **settings)
        self.losses.append(float(loss.detach()))
        return loss

    def log(self, logs, *arguments, **settings):
        if "grad_norm" in logs:
            self.norms.append(float(logs["grad_norm"]))
        super().log(logs, *arguments, **settings)


def by_trainer(task, backbone, splits, rows, folder, schedule):
    torch.manual_seed(0)
    model = get_peft_model(
        backbone.module,
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=DROPOUT,
            target_modules=list(backbone.layers),
            modules_to_save=list(backbone.head),
        ),
    )

    def collate(chosen):
        batch = task.collate(splits.train, chosen, None)
        return batch.inputs | {"labels": batch.labels}

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=RATE,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        warmup_steps=WARMUP,
        lr_scheduler_type=schedule.replace("constant", "constant_with_warmup"),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = RecordingTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    return trainer.losses, trainer.norms, model


def by_our_loop(task, backbone, splits, schedule):
    method = method_of(f"lora[rank={RANK},alpha={ALPHA},dropout={DROPOUT},learning_rate={RATE},weight_decay={DECAY}]")
    train = TrainSpec(batches=UPDATES, batch_size=BATCH, schedule=schedule, warmup=WARMUP / UPDATES, clip_norm=CLIP)
    data = TrainingData(len(splits.train), BATCH, seed=0)
    torch.manual_seed(0)
    adaptation = method.start(backbone, train, data, torch.Generator().manual_seed(0))
    adaptation.before_forward = lambda step: torch.manual_seed(step.index)
    training = Training(adaptation, task, splits.train, data, train, CPU, UPDATES)
    task.set_training(adaptation.model)
    training.run(lambda training: None)
    history = training.history
    return [row["loss"] for row in history], [row["gradient_norm"] for row in history], adaptation.model


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_losses_gradient_norms_and_weights_agree_with_those_of_the_trainer(schedule, tmp_path):
    task = task_of("synthetic")
    splits = make_splits(task, None)
    torch.manual_seed(0)
    backbone = task.backbone(None)
    data = TrainingData(len(splits.train), BATCH, seed=0)
    rows = [row for _ in range(UPDATES) for row in data.draw("all")]
    theirs, their_norms, their_model = by_trainer(task, copy.deepcopy(backbone), splits, rows, tmp_path, schedule)
    ours, our_norms, our_model = by_our_loop(task, backbone, splits, schedule)
    assert len(theirs) == UPDATES
    assert ours == pytest.approx(theirs, abs=TOLERANCE)
    assert our_norms == pytest.approx(their_norms, abs=1e-4)
    assert max(our_norms) > CLIP, "nothing was clipped: the test does not see clipping"
    for name, value in their_model.state_dict().items():
        torch.testing.assert_close(our_model.state_dict()[name], value, rtol=0, atol=TOLERANCE, msg=name)
