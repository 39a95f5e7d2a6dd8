"""The scripts for Lightning and the Hugging Face Trainer each train as a plain loop does."""

import functools

import pytest
import torch
from helpers.scripts import code_blocks, script
from helpers.trainers import (
    ACCUMULATED,
    EPOCHS,
    NEEDED,
    STEPS,
    assert_alike,
    batches,
    coefficients,
    network,
    of_all_epochs,
    plain,
    quietly,
    sparse_adamw,
    sparse_sgd,
)
from torch.optim.lr_scheduler import LambdaLR

from cges_kernels import CoefficientWarmup

pytestmark = [
    pytest.mark.full("the scripts for Lightning and Transformers, which take long to import"),
    pytest.mark.xdist_group("trainers"),
    pytest.mark.usefixtures("trainers"),
    pytest.mark.filterwarnings("ignore"),  # trainers give advice on loggers, workers and devices
]
pytest.importorskip("sklearn", reason="scikit-learn, whose digits the scripts train on, is not installed")


# Lightning


@pytest.fixture
def run_lightning(tmp_path, monkeypatch):
    """Runs the script's train() on a model; returns its trainer."""
    pytest.importorskip("lightning", reason=NEEDED)
    module = script("train_with_lightning")

    def run(net, resume=None, make_optimizer=sparse_sgd, **options):
        monkeypatch.setattr(module, "make_optimizer", make_optimizer)
        quiet = dict(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
        with monkeypatch.context() as patch:
            quietly(patch, module, "Trainer", **{**quiet, **options})
            out = tmp_path / ("resumed" if resume else "whole")
            return module.train(net, batches(), EPOCHS, out, resume)

    return run


OPTIMIZERS = pytest.mark.parametrize("make_optimizer", [sparse_sgd, sparse_adamw])


@OPTIMIZERS
def test_lightning(run_lightning, make_optimizer):
    """Mixed precision with clipping, which Lightning refuses an optimizer that always unscales by itself."""
    net, other = network(), network()
    assert run_lightning(net, make_optimizer=make_optimizer).global_step == STEPS
    optimizer = make_optimizer(other)
    warmup = CoefficientWarmup(optimizer, STEPS // 2)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    norm = plain(
        other, optimizer, of_all_epochs(), schedulers=[warmup], precision=autocast, clipped=in_groups
    )
    assert norm > 1
    assert_alike(net, other)


@OPTIMIZERS
def test_lightning_resumes_in_the_middle_of_the_warmup(run_lightning, make_optimizer, tmp_path):
    net, resumed = network(), network()
    run_lightning(net, make_optimizer=make_optimizer)
    first = tmp_path / "whole" / "epoch=0.ckpt"
    assert run_lightning(resumed, first, make_optimizer).global_step == STEPS
    assert_alike(net, resumed)


@pytest.mark.gpu
@OPTIMIZERS
def test_lightning_scales_and_clips(run_lightning, make_optimizer):
    net = network()
    options = dict(precision="16-mixed", accelerator="gpu", devices=1)
    trainer = run_lightning(net, make_optimizer=make_optimizer, **options)
    assert trainer.global_step == STEPS
    assert all(p.isfinite().all() for p in net.parameters())
    assert any((p == 0).any() for p in net.parameters())


# Hugging Face Trainer


def language_model():
    """A GPT-2 of random weights: Conv1D layers, and an embedding tied to the head."""
    transformers = pytest.importorskip("transformers", reason=NEEDED)
    without = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, loss_type="ForCausalLM")
    sizes = dict(vocab_size=64, n_positions=8, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **without, bos_token_id=0, eos_token_id=0)
    )


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    """The script, with options that keep the Trainer on the CPU and quiet."""
    pytest.importorskip("transformers", reason=NEEDED)
    pytest.importorskip("accelerate", reason=NEEDED)
    module = script("train_with_hf_trainer")
    quiet = dict(use_cpu=True, disable_tqdm=True, logging_strategy="no", per_device_train_batch_size=4)
    quietly(monkeypatch, module, "TrainingArguments", **quiet)
    monkeypatch.setattr(module, "make_optimizer", sparse_sgd)
    monkeypatch.chdir(tmp_path)
    return module


def texts():
    ids = torch.randint(
        64, (4 * ACCUMULATED * STEPS // EPOCHS, 8), generator=torch.Generator().manual_seed(0)
    )
    return [dict(input_ids=row, labels=row) for row in ids]


@pytest.fixture
def run_transformers(hugging_face, tmp_path, monkeypatch):
    """Runs the script's train() on a model; returns its trainer and the batches that it took."""
    warmup = hugging_face.Warmup
    monkeypatch.setattr(hugging_face, "Warmup", lambda steps: warmup(STEPS // 2))  # of smaller batches

    def run(model, resume=None):
        seen = []
        hook = model.register_forward_pre_hook(lambda m, args, batch: seen.append(batch), with_kwargs=True)
        out = tmp_path / ("resumed" if resume else "whole")
        trainer = hugging_face.train(model, texts(), EPOCHS, out, resume and tmp_path / resume)
        hook.remove()
        return trainer, seen

    return run


def as_scheduler(hugging_face):
    """The page's other way: a schedule of the coefficients in lr's place. Runs as run_transformers."""
    (block,) = [text for text in code_blocks("docs/trainers.md") if "optimizers=(optimizer, warmup)" in text]

    def run(model, resume=None):
        seen = []
        hook = model.register_forward_pre_hook(lambda m, args, batch: seen.append(batch), with_kwargs=True)
        args = hugging_face.TrainingArguments(
            "resumed" if resume else "whole",
            num_train_epochs=EPOCHS,
            gradient_accumulation_steps=ACCUMULATED,
            max_grad_norm=1.0,
            save_strategy="epoch",
            report_to="none",
        )
        names = dict(CoefficientWarmup=CoefficientWarmup, Trainer=hugging_face.Trainer, dataset=texts())
        scope = dict(names, model=model, optimizer=sparse_sgd(model), args=args)
        exec(block.replace("steps=1000", f"steps={STEPS // 2}"), scope)
        scope["trainer"].train(resume_from_checkpoint=resume)
        hook.remove()
        return scope["trainer"], seen

    return run


def language_loss(model, batch):
    return model(**batch).loss


def linear(optimizer):
    return LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def test_transformers(run_transformers):
    """Its linear schedule ends at lr 0, and thresholds with it; the warm-up is a callback."""
    model, other = language_model(), language_model()
    trainer, seen = run_transformers(model)
    assert trainer.state.global_step == STEPS and len(seen) == ACCUMULATED * STEPS
    optimizer = sparse_sgd(other)
    schedulers = [linear(optimizer), CoefficientWarmup(optimizer, STEPS // 2)]
    assert plain(other, optimizer, seen, language_loss, schedulers) > 1
    assert_alike(model, other)
    assert model.lm_head.weight is model.transformer.wte.weight and (model.lm_head.weight != 0).all()


@pytest.mark.parametrize("way", ["callback", "optimizers"])
def test_transformers_resumes_in_the_middle_of_the_warmup(request, hugging_face, way):
    """Rebuilt and loaded it ends where the run that went on ends."""
    run = request.getfixturevalue("run_transformers") if way == "callback" else as_scheduler(hugging_face)
    model, resumed = language_model(), language_model()
    went_on, _ = run(model)
    again, _ = run(resumed, f"whole/checkpoint-{STEPS // EPOCHS}")
    assert again.state.global_step == STEPS
    assert_alike(model, resumed)
    assert coefficients(again.optimizer) == coefficients(went_on.optimizer)
    full = sparse_sgd(language_model()).param_groups
    assert coefficients(went_on.optimizer)[0]["exclusive_lasso"] == full[0]["exclusive_lasso"]


def test_transformers_steps_a_schedule_of_coefficients(hugging_face):
    """In lr's place: the Trainer asks it for lr, which stays."""
    model, other = language_model(), language_model()
    trainer, seen = as_scheduler(hugging_face)(model)
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.1
    optimizer = sparse_sgd(other)
    warmup = CoefficientWarmup(optimizer, STEPS // 2)
    assert plain(other, optimizer, seen, language_loss, [warmup]) > 1
    assert_alike(model, other)


def test_transformers_resumes_adamw(hugging_face, run_transformers, monkeypatch):
    monkeypatch.setattr(hugging_face, "make_optimizer", sparse_adamw)
    model, resumed, other = language_model(), language_model(), language_model()
    _, seen = run_transformers(model)
    run_transformers(resumed, f"whole/checkpoint-{STEPS // EPOCHS}")
    optimizer = sparse_adamw(other)
    plain(
        *(other, optimizer, seen, language_loss),
        [linear(optimizer), CoefficientWarmup(optimizer, STEPS // 2)],
    )
    assert_alike(model, other)
    assert_alike(model, resumed)
