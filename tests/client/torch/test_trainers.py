"""Programs that train for their user: transformers' Trainer, accelerate and Lightning, with small random models.

Each trains a model with torch's optimizer and a copy of it with stepwire's, and the two end alike.
"""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

import stepwire.torch as remote_optim

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about themselves

NUMBERS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.98)}
STEPS = 6


def optimizer_of(kind: str, parameters: Any, target: str) -> torch.optim.Optimizer:
    if kind == "torch":
        return torch.optim.AdamW(parameters, **NUMBERS)
    return remote_optim.AdamW(parameters, server=target, **NUMBERS)


def assert_alike(ours: torch.nn.Module, theirs: torch.nn.Module, start: torch.nn.Module) -> None:
    """Compare two trained models: roundings apart, and far from where they started.

    The gradient of a bias of attention's keys is rounding alone, and Adam divides it by its own size.
    """
    for name, expected in theirs.named_parameters():
        np.testing.assert_allclose(
            ours.get_parameter(name).detach().numpy(), expected.detach().numpy(), rtol=2e-5, atol=1e-4, err_msg=name
        )
    moved = max(
        float((expected - start.get_parameter(name)).abs().max()) for name, expected in theirs.named_parameters()
    )
    assert moved > 1e-2


# --- transformers ------------------------------------------------------------------------------------------


def language_model() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def trained_by_transformers(model: Any, kind: str, target: str, folder: pathlib.Path, *, resume: bool = False) -> Any:
    transformers = pytest.importorskip("transformers")
    tokens = np.random.default_rng(1).integers(0, 40, (32, 8))
    rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in tokens]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS if resume else STEPS // 2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        warmup_steps=2,
        lr_scheduler_type="constant_with_warmup",
        save_steps=STEPS // 2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    optimizer = optimizer_of(kind, model.parameters(), target)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    if kind == "stepwire":
        assert optimizer.applied_step >= STEPS // 2  # type: ignore[attr-defined]
        optimizer.close()  # type: ignore[attr-defined]
    return model


def test_a_model_of_transformers_is_trained_saved_and_trained_on(target: str, tmp_path: pathlib.Path) -> None:
    start = language_model()
    ended = {}
    for kind in ("torch", "stepwire"):
        folder = tmp_path / kind
        trained_by_transformers(copy.deepcopy(start), kind, target, folder)
        ended[kind] = trained_by_transformers(copy.deepcopy(start), kind, target, folder, resume=True)
    assert_alike(ended["stepwire"], ended["torch"], start)


# --- accelerate --------------------------------------------------------------------------------------------


def perceptron() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = np.random.default_rng(5)
    return [
        (torch.tensor(random.standard_normal((4, 6)), dtype=torch.float32), torch.tensor(random.integers(0, 3, 4)))
        for _ in range(2 * STEPS)
    ]


def test_a_loop_with_accelerate_ends_as_torchs(target: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    start, ended, rates = perceptron(), {}, {}
    for kind in ("torch", "stepwire"):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        inner = optimizer_of(kind, (model := copy.deepcopy(start)).parameters(), target)
        schedule = torch.optim.lr_scheduler.StepLR(inner, 2, gamma=0.5)
        loader = torch.utils.data.DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
        model, optimizer, scheduler = accelerator.prepare(model, inner, schedule)
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.cross_entropy(model(inputs), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        ended[kind], rates[kind] = accelerator.unwrap_model(model), scheduler.get_last_lr()
        if kind == "stepwire":
            assert inner.applied_step == STEPS  # type: ignore[attr-defined]
            inner.close()  # type: ignore[attr-defined]
    assert rates["stepwire"] == rates["torch"]
    assert_alike(ended["stepwire"], ended["torch"], start)


# --- Lightning ---------------------------------------------------------------------------------------------


def test_a_module_of_lightning_ends_as_with_torchs(target: str, tmp_path: pathlib.Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind, self.model = kind, copy.deepcopy(start)

        def training_step(self, batch: Any, index: int) -> Any:
            inputs, labels = batch
            return torch.nn.functional.cross_entropy(self.model(inputs), labels)

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(self.kind, self.parameters(), target)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}

    start, ended = perceptron(), {}
    for kind in ("torch", "stepwire"):
        module = Module(kind)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            gradient_clip_val=0.5,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path / kind),
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]
        checkpoint = tmp_path / kind / "end.ckpt"
        trainer.save_checkpoint(checkpoint)
        again = Module(kind)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=3,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        loader = torch.utils.data.DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(again, loader, ckpt_path=checkpoint, weights_only=False)
        ended[kind] = again.model
    assert_alike(ended["stepwire"], ended["torch"], start)
