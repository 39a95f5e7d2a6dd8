"""The README's recipes for Lightning, Hugging Face's Trainer and accelerate train as a plain loop does."""

import contextlib
import copy
import functools
import types

import pytest
import torch
from helpers.readme import BLOCKS, Net
from helpers.steps import assert_same_bits
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from cges_kernels import CoefficientWarmup, ProxAdamW, ProxSGD, TargetDensity, cges_param_groups

pytestmark = [
    pytest.mark.full(
        "the README's recipes for Lightning, Transformers and accelerate work; these take long to import"
    ),
    pytest.mark.xdist_group("trainers"),
    pytest.mark.usefixtures("trainers"),
    pytest.mark.filterwarnings("ignore"),  # trainers warn about loggers, workers and devices
]
LIGHTNING, TRANSFORMERS, ACCELERATE = (
    next(block for block in BLOCKS if name in block)
    for name in ("lightning.Trainer", "TrainingArguments", "Accelerator")
)
NEEDED = "the extra `trainers` is not installed"
STEPS, ACCUMULATED = 20, 2
loss_fn = nn.CrossEntropyLoss()
OURS = dict(
    ProxSGD=ProxSGD,
    ProxAdamW=ProxAdamW,
    CoefficientWarmup=CoefficientWarmup,
    cges_param_groups=cges_param_groups,
)


def batches(steps=STEPS):
    """The batches of ``steps`` steps; each step accumulates gradients of two."""
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(5 * ACCUMULATED * steps, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(3, (len(x),), generator=generator)), batch_size=5)


def loss_of(model, batch):
    return loss_fn(model(batch[0]), batch[1]) / ACCUMULATED


def sparse_sgd(model):
    """The optimizer that the recipes build."""
    return ProxSGD(cges_param_groups(model, lam=3e-2, scale="size"), lr=0.1, momentum=0.9)


def plain(
    model, optimizer, batches, loss_of=loss_of, schedulers=(), precision=contextlib.nullcontext, clipped=None
):
    """The loop that a trainer stands for. It clips to norm 1 and returns the largest norm before that."""
    model.train()
    clipped = clipped or list(model.parameters())  # the order of gradients decides how their norm is rounded
    norms = []
    for i, batch in enumerate(batches):
        with precision():
            loss = loss_of(model, batch)
        loss.backward()
        if i % ACCUMULATED == ACCUMULATED - 1:
            norms.append(nn.utils.clip_grad_norm_(clipped, 1.0))
            optimizer.step()
            optimizer.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
    return max(norms)


def assert_alike(model, other):
    """Both models have the same bits, and some but not all weights are zero."""
    assert_same_bits(list(model.parameters()), list(other.parameters()))
    assert any((p == 0).any() and (p != 0).any() for p in model.parameters())


# Lightning


@pytest.fixture
def run_lightning(tmp_path, monkeypatch):
    """A function that runs the recipe on a model and returns its trainer."""
    lightning = pytest.importorskip("lightning", reason=NEEDED)
    monkeypatch.chdir(tmp_path)

    def run(net, recipe=LIGHTNING, loader=None, **options):
        quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = functools.partial(lightning.Trainer, **{**quiet, "enable_checkpointing": False, **options})
        names = types.SimpleNamespace(LightningModule=lightning.LightningModule, Trainer=trainer)
        scope = dict(OURS, lightning=names, Net=lambda: net, loss_fn=loss_fn, loader=loader or batches())
        exec(recipe, scope)
        return scope["trainer"]

    return run


def test_lightning(run_lightning):
    """The recipe gives the bits of a plain loop, with mixed precision and clipping.

    Lightning refuses to clip for an optimizer that always unscales gradients itself.
    """
    torch.manual_seed(0)  # with this seed some weights become zero in so few steps
    net = Net()
    other = copy.deepcopy(net)
    assert run_lightning(net).global_step == STEPS
    optimizer = sparse_sgd(other)
    warmup = CoefficientWarmup(optimizer, steps=10)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert plain(other, optimizer, batches(), schedulers=[warmup], precision=autocast, clipped=in_groups) > 1
    assert_alike(net, other)


def test_lightning_resumes_in_the_middle_of_the_warmup(run_lightning):
    """A run resumed from a checkpoint ends with the bits of the run that went on."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    net = Net()
    resumed = copy.deepcopy(net)
    batch = next(iter(batches()))  # always the same batch, because Lightning starts the loader anew
    same = DataLoader([batch] * ACCUMULATED * STEPS, batch_size=None)
    saving = ModelCheckpoint(".", "{step}", every_n_train_steps=5, save_top_k=-1)
    run_lightning(net, loader=same, enable_checkpointing=True, callbacks=[saving])
    recipe = LIGHTNING.replace("Module(), loader)", 'Module(), loader, ckpt_path="step=5.ckpt")')
    assert run_lightning(resumed, recipe, same).global_step == STEPS
    assert_alike(net, resumed)


@pytest.mark.gpu
def test_lightning_scales_and_clips(run_lightning):
    """With float16 on a GPU, scaling, clipping and our step work together."""
    net = Net()
    trainer = run_lightning(net, LIGHTNING.replace("bf16-", "16-"), accelerator="gpu", devices=1)
    assert trainer.global_step == STEPS
    assert all(p.isfinite().all() for p in net.parameters())
    assert any((p == 0).any() for p in net.parameters())


# Hugging Face Trainer


def language_model():
    """A GPT-2 of random weights: it has Conv1D layers, and an embedding tied to the head."""
    transformers = pytest.importorskip("transformers", reason=NEEDED)
    without = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, loss_type="ForCausalLM")
    sizes = dict(vocab_size=64, n_positions=8, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **without, bos_token_id=0, eos_token_id=0)
    )


@pytest.fixture
def run_transformers(tmp_path, monkeypatch):
    """A function that runs the recipe on a model and returns its trainer."""
    transformers = pytest.importorskip("transformers", reason=NEEDED)
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(64, (4 * ACCUMULATED * STEPS, 8), generator=torch.Generator().manual_seed(0))

    def run(model, recipe=TRANSFORMERS):
        quiet = dict(use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no")
        arguments = functools.partial(
            transformers.TrainingArguments, **quiet, per_device_train_batch_size=4, save_steps=10
        )
        dataset = [dict(input_ids=row, labels=row) for row in ids]
        named = {name: getattr(transformers, name) for name in ("Trainer", "TrainerCallback")}
        scope = dict(OURS, model=model, dataset=dataset, TrainingArguments=arguments, **named)
        exec(recipe, scope)
        return scope["trainer"]

    return run


def test_transformers(run_transformers):
    """The recipe gives the bits of a plain loop, with a linear schedule of lr and a warm-up of coefficients.

    The schedule ends at lr = 0, and thresholds with it. The tied embedding must not be regularised.
    """
    model, other = language_model(), language_model()
    seen = []
    hook = model.register_forward_pre_hook(lambda m, args, batch: seen.append(batch), with_kwargs=True)
    assert run_transformers(model).state.global_step == STEPS
    hook.remove()
    assert len(seen) == ACCUMULATED * STEPS
    optimizer = sparse_sgd(other)
    linear = LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    schedulers = [linear, CoefficientWarmup(optimizer, 15)]
    assert plain(other, optimizer, seen, lambda model, batch: model(**batch).loss, schedulers) > 1
    assert_alike(model, other)
    assert model.lm_head.weight is model.transformer.wte.weight and (model.lm_head.weight != 0).all()


RESUMED = 'train(resume_from_checkpoint="checkpoints/checkpoint-10")'
AS_SCHEDULER = (
    TRANSFORMERS.replace("optimizers=(optimizer, None)", "optimizers=(optimizer, warmup)")
    .replace(", callbacks=[Warmup()]", "")
    .replace("trainer = ", "warmup = CoefficientWarmup(optimizer, steps=15)\ntrainer = ")
)


def coefficients(optimizer):
    """lr and coefficients of each param group."""
    keys = ("lr", "group_lasso", "exclusive_lasso", "l1")
    return [{key: float(group[key]) for key in keys} for group in optimizer.param_groups]


@pytest.mark.parametrize("recipe", [TRANSFORMERS, AS_SCHEDULER], ids=["callback", "optimizers"])
def test_transformers_resumes_in_the_middle_of_the_warmup(run_transformers, recipe):
    """A run resumed from a checkpoint ends with the bits and coefficients of the run that went on."""
    model, resumed = language_model(), language_model()
    went_on = run_transformers(model, recipe)
    again = run_transformers(resumed, recipe.replace("train()", RESUMED))
    assert again.state.global_step == STEPS
    assert_alike(model, resumed)
    assert coefficients(again.optimizer) == coefficients(went_on.optimizer)
    full = sparse_sgd(language_model()).param_groups
    assert coefficients(went_on.optimizer)[0]["exclusive_lasso"] == full[0]["exclusive_lasso"]


def test_transformers_steps_a_schedule_of_coefficients(run_transformers):
    """The warm-up may be given to the Trainer as its lr scheduler: it is stepped, and lr stays."""
    model, other = language_model(), language_model()
    seen = []
    hook = model.register_forward_pre_hook(lambda m, args, batch: seen.append(batch), with_kwargs=True)
    trainer = run_transformers(model, AS_SCHEDULER)
    hook.remove()
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.1
    optimizer = sparse_sgd(other)
    warmup = CoefficientWarmup(optimizer, 15)
    assert plain(other, optimizer, seen, lambda model, batch: model(**batch).loss, [warmup]) > 1
    assert_alike(model, other)


# accelerate


@pytest.fixture
def run_accelerate():
    """A function that runs the recipe on a model and returns its variables."""
    accelerate = pytest.importorskip("accelerate", reason=NEEDED)

    def run(model, recipe=ACCELERATE):
        accelerator = functools.partial(accelerate.Accelerator, cpu=True)
        scope = dict(OURS, model=model, loader=batches(), loss_fn=loss_fn, Accelerator=accelerator)
        exec(recipe, scope)
        return scope

    yield run
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate(run_accelerate):
    """The recipe gives the bits of a plain loop."""
    net = Net()
    other = copy.deepcopy(net)
    run_accelerate(net)
    optimizer = sparse_sgd(other)
    assert plain(other, optimizer, batches(), schedulers=[CoefficientWarmup(optimizer, 15)]) > 1
    assert_alike(net, other)


@pytest.mark.parametrize("make", [lambda o: CoefficientWarmup(o, 15), lambda o: TargetDensity(o, 0.5, 15)])
def test_accelerate_resumes_in_the_middle_of_a_schedule(run_accelerate, tmp_path, make):
    """accelerate saves and loads our schedules, and the resumed run ends with the same bits."""
    accelerate = pytest.importorskip("accelerate", reason=NEEDED)
    data = list(batches())

    def run(net, begin, end, load=None):
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = sparse_sgd(net)
        model, optimizer, schedule = accelerator.prepare(net, optimizer, make(optimizer))
        if load:
            accelerator.load_state(load)
        for x, y in data[begin:end]:
            accelerator.backward(loss_fn(model(x), y))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        accelerator.save_state(tmp_path / f"{begin}-{end}")
        return coefficients(optimizer)

    net, resumed = Net(), Net()
    start = copy.deepcopy(net)
    whole = run(net, 0, 12)
    middle = run(start, 0, 7)
    assert middle != whole
    assert run(resumed, 7, 12, tmp_path / "0-7") == whole
    assert_same_bits(list(net.parameters()), list(resumed.parameters()))


def by_mapping(optimizer, old, new):
    """Replaces parameters as accelerate does on TPUs."""
    optimizer._switch_parameters(dict(zip(old, new)))


def by_memory(optimizer, old, new):
    """Replaces parameters as accelerate does with FSDP2.

    First it puts stand-ins into the param groups, whose method data_ptr is an address instead.
    """
    from accelerate.utils import fsdp2_switch_optimizer_parameters

    addresses = {p.data_ptr(): q for p, q in zip(old, new)}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype)
            group["params"][i].data_ptr = p.data_ptr()
    fsdp2_switch_optimizer_parameters(optimizer, addresses)


@pytest.mark.parametrize("switch", [by_mapping, by_memory])
def test_accelerate_may_replace_the_parameters(run_accelerate, switch):
    """Training goes on in the new parameters; the old ones do not change despite gradients."""
    net = Net()
    prepared = run_accelerate(net)["optimizer"]
    before = [p.detach().clone() for p in net.parameters()]
    model, other = copy.deepcopy(net), copy.deepcopy(net)
    switch(prepared, list(net.parameters()), list(model.parameters()))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    plain(model, prepared, batches())
    # a new optimizer, because the state stays with the old parameters
    plain(other, sparse_sgd(other), batches())
    assert_alike(model, other)
    assert_same_bits(before, list(net.parameters()))


# The recipes with ProxAdamW instead of ProxSGD


def of_adamw(recipe):
    """The recipe with ProxAdamW."""
    changed = recipe.replace("ProxSGD", "ProxAdamW").replace("lr=0.1, momentum=0.9", "lr=0.02")
    assert changed.count("lr=0.02") == 1
    return changed.replace("lam=3e-2", "lam=0.5")


def sparse_adamw(model):
    """The optimizer that such a recipe builds."""
    return ProxAdamW(cges_param_groups(model, lam=0.5, scale="size"), lr=0.02)


def test_transformers_resumes_adamw(run_transformers):
    """The recipe gives the bits of a plain loop, and so does a resumed run."""
    model, resumed, other = language_model(), language_model(), language_model()
    seen = []
    hook = model.register_forward_pre_hook(lambda m, args, batch: seen.append(batch), with_kwargs=True)
    run_transformers(model, of_adamw(TRANSFORMERS))
    hook.remove()
    run_transformers(resumed, of_adamw(TRANSFORMERS).replace("train()", RESUMED))
    optimizer = sparse_adamw(other)
    schedulers = [LambdaLR(optimizer, lambda step: 1 - step / STEPS), CoefficientWarmup(optimizer, 15)]
    plain(other, optimizer, seen, lambda model, batch: model(**batch).loss, schedulers)
    assert_alike(model, other)
    assert_alike(model, resumed)


def test_accelerate_with_adamw(run_accelerate):
    """The recipe gives the bits of a plain loop."""
    net = Net()
    other = copy.deepcopy(net)
    run_accelerate(net, of_adamw(ACCELERATE))
    optimizer = sparse_adamw(other)
    plain(other, optimizer, batches(), schedulers=[CoefficientWarmup(optimizer, 15)])
    assert_alike(net, other)
