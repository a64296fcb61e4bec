"""Sparsifier in other people's loops: the real Trainer of transformers, the real Trainer of Lightning, two processes."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import rarefy
from conftest import Net, image_batches
from rarefy.common.errors import ContainerError, ModelError, PatternError, RecipeError
from rarefy.train.sparsifier import Sparsifier as Bare
from rarefy.train.sparsity_config import Gradual, Movement, Rigl

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

RECIPE = {
    "stages": [
        {
            "train": {
                "epochs": 2,
                "prune": {"pattern": "2:4", "steps": 3, "end": 0.6, "layers": "model.layers.*"},
                "distill": {"logits": 1.0, "temperature": 2.0, "hidden": "squarehead"},
            }
        }
    ]
}


def llama(seed=0, blocks=2):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Texts(torch.utils.data.Dataset):
    def __init__(self, n=16):
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(64, (n, 12), generator=g)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer_of(model, callback, folder, **more):
    options = {
        "output_dir": str(folder), "num_train_epochs": 2, "per_device_train_batch_size": 2, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3, "save_steps": 3, "logging_steps": 2, "seed": 1,
        "gradient_accumulation_steps": 2, "weight_decay": 0.1, **more,
    }  # fmt: skip
    args = transformers.TrainingArguments(**options)
    return transformers.Trainer(model, args, train_dataset=Texts(), callbacks=[callback])


def test_inside_the_trainer_of_transformers(tmp_path):
    from rarefy.integrations.hf_trainer import SparsifyCallback

    model = llama()
    callback = SparsifyCallback(RECIPE)
    trainer = trainer_of(model, callback, tmp_path / "a")
    assert len(rarefy.masks(model)) == 14  # there before anything wraps or loads the model
    trainer.train()
    assert callback.sparsifier.count == trainer.state.max_steps == 8 and callback.sparsifier.done
    assert any("sparsity" in row for row in trainer.state.log_history)
    for name, p in model.model.layers.named_parameters():
        if p.dim() == 2:
            assert int((p.reshape(-1, 4) != 0).sum(1).max()) <= 2, name  # folded: ordinary weights, zeros in place
    trainer.save_model(str(tmp_path / "out"))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)

    # taken up from a checkpoint in the middle: the same weights
    other = llama()
    late = SparsifyCallback(RECIPE)
    trainer_of(other, late, tmp_path / "a").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert late.sparsifier.sparsity == 0.5
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)


def test_the_loss_of_a_step_is_the_teachers_and_the_models(tmp_path):
    from rarefy.integrations.hf_trainer import SparsifyCallback

    model, callback = llama(), SparsifyCallback(RECIPE)
    trainer = trainer_of(model, callback, tmp_path / "a")
    batch = {k: torch.stack([Texts()[i][k] for i in range(2)]) for k in ("input_ids", "labels")}
    model.train()
    want = rarefy.Distiller(model, llama(), rarefy.Distill(temperature=2.0, hidden="squarehead"))
    hook, callback.sparsifier.loss = callback.sparsifier.loss, lambda out, batch: out.loss
    own = model(**batch)
    callback.sparsifier.loss = hook
    torch.testing.assert_close(model(**batch).loss, want(own, batch, own.loss))
    many = torch.tensor(2 * 2 * 11)  # tokens of both batches of a step
    torch.testing.assert_close(model(**batch, num_items_in_batch=many).loss, want(model(**batch), batch, own.loss) / 2)
    model.eval()
    torch.testing.assert_close(model(**batch).loss, own.loss)  # evaluation sees the model's own
    assert trainer.args.gradient_accumulation_steps == 2


@pytest.mark.slow
def test_a_checkpoint_without_the_sparsifier_is_said(tmp_path):
    from rarefy.integrations.hf_trainer import FILE, SparsifyCallback

    trainer_of(llama(), SparsifyCallback(RECIPE), tmp_path / "a", max_steps=4).train()
    (tmp_path / "a" / "checkpoint-3" / FILE).unlink()
    trainer = trainer_of(llama(), SparsifyCallback(RECIPE), tmp_path / "a", max_steps=4)
    with pytest.raises(ContainerError, match="the checkpoint was saved without this callback"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_said(tmp_path):
    from rarefy.integrations.hf_trainer import FILE, SparsifyCallback

    trainer_of(llama(), SparsifyCallback(RECIPE), tmp_path / "a", max_steps=4).train()
    file = tmp_path / "a" / "checkpoint-3" / FILE
    file.write_bytes(file.read_bytes()[:40])
    trainer = trainer_of(llama(), SparsifyCallback(RECIPE), tmp_path / "a", max_steps=4)
    with pytest.raises(ContainerError, match=r"is damaged or cut short: remove this checkpoint, and resume from an"):
        trainer.train(resume_from_checkpoint=str(file.parent))


def test_a_callback_that_comes_too_late_is_said(tmp_path):
    from rarefy.integrations.hf_trainer import SparsifyCallback

    trainer = trainer_of(llama(), transformers.TrainerCallback(), tmp_path / "a")
    trainer.add_callback(SparsifyCallback(RECIPE))
    with pytest.raises(ModelError, match=r"added to a Trainer that existed already, .* callbacks=\[SparsifyCallback"):
        trainer.train()


def test_inside_the_trainer_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    from rarefy.integrations.lightning import SparsifyCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = Net()

        def training_step(self, batch, index):
            callback = next(c for c in self.trainer.callbacks if isinstance(c, SparsifyCallback))
            return callback.sparsifier.loss(self.net(batch[0]), batch)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2, weight_decay=0.1)

    recipe = {
        "stages": [
            {
                "train": {
                    "prune": {"method": "rigl", "sparsity": 0.6, "steps": 2},
                    "distill": {"logits": 1.0, "by": "mse"},
                }
            }
        ]
    }

    def fit(module, epochs, checkpoint=None):
        callback = SparsifyCallback(recipe, of="net", fold=epochs == 4)
        loader = torch.utils.data.DataLoader([b for b in image_batches() * 4], batch_size=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saver = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
            trainer = lightning.Trainer(
                max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                callbacks=[callback, saver], accumulate_grad_batches=2, default_root_dir=tmp_path,
                limit_train_batches=8,
            )  # fmt: skip
            trainer.fit(module, loader, ckpt_path=checkpoint)
        return callback, trainer

    module = Module()
    callback, trainer = fit(module, 4)
    assert callback.sparsifier.count == trainer.global_step == 16 and callback.sparsifier.done
    zeros = sum(int((l.weight == 0).sum()) for l in (module.net.conv, module.net.hidden))
    total = sum(l.weight.numel() for l in (module.net.conv, module.net.hidden))
    assert zeros / total == pytest.approx(0.6, abs=0.02) and not rarefy.masks(module.net)
    other = Module()
    fit(other, 4, str(next(tmp_path.glob("epoch=1*.ckpt"))))
    for a, b in zip(module.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)


def test_a_recipe_in_a_loop_of_ones_own():
    model, batches = Net(), image_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recipe = {
        "stages": [
            {
                "train": {
                    "epochs": 3,
                    "prune": {"sparsity": 0.5, "steps": 3},
                    "quantize": {"weights": "int4", "start": 0.5},
                }
            }
        ]
    }
    sparsifier = rarefy.Sparsifier(model, recipe, steps_per_epoch=len(batches), optimizer=optimizer)
    for _ in range(3):
        for batch in batches:
            sparsifier.loss(model(batch[0]), batch).backward()
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()
    rarefy.fold_(model)
    assert sparsifier.done and int((model.hidden.weight == 0).sum()) >= 64
    assert all(len(row.unique()) <= 16 for row in model.hidden.weight.detach())


BAD = {
    "two stages": ({"stages": [{"prune": {"sparsity": 0.5}}, {"train": {}}]}, {}, RecipeError, "with the single stage train; recipe has prune, train"),
    "both steps": ({"stages": [{"train": {}}]}, {"steps": 3, "steps_per_epoch": 3}, RecipeError, "give steps_per_epoch or steps, not both"),
    "no steps": ({"stages": [{"train": {}}]}, {"steps_per_epoch": 0}, PatternError, "steps_per_epoch: expected a whole number of at least 1"),
    "a plan by epochs": (Gradual(sparsity=0.5), {"steps_per_epoch": 3}, RecipeError, "steps_per_epoch needs a recipe with epochs: give steps"),
    "idle teacher": (Gradual(sparsity=0.5), {"steps": 3, "teacher": nn.Linear(2, 2)}, RecipeError, "teacher has no effect"),
    "overrides": (Gradual(sparsity=0.5), {"steps": 3, "sparsity": 0.4}, RecipeError, "overrides need a recipe: sparsity"),
    "static": ({"stages": [{"train": {"quantize": {"weights": "int8", "activations": "int8-static", "start": 0}}}]}, {"steps": 3}, ValueError, "reads calibration data: give calibrate=batches"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_a_loop_cannot_take(case):
    recipe, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        rarefy.Sparsifier(Net(), recipe, **options)


def _worker(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name, plan in PLANS.items():
        for wrap in ("ddp", "fsdp"):
            results[f"{name} {wrap}"] = _parallel(rank, plan, wrap)
    torch.save(results, f"{out}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may still hold Python objects, which the interpreter's end would stop in the middle


PLANS = {
    "gradual": Gradual(sparsity=0.6, steps=3, end=0.6),
    "rigl": Rigl(sparsity=0.6, steps=2),
    "movement": Movement(pattern="2:4", steps=3, end=0.6, ignore=["conv", "deep", "up"]),
}


def _parallel(rank: int, plan, wrap: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Net()
    if wrap == "fsdp":
        from torch.distributed.fsdp import fully_shard

        sparsifier = Bare(model, plan, steps=6)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh)
        run = model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier.use(optimizer)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = Bare(model, plan, steps=6, optimizer=optimizer)
        run = nn.parallel.DistributedDataParallel(model)
    for x, y in (image_batches() * 2)[:6]:
        half = len(x) // 2
        part = slice(0, half) if rank == 0 else slice(half, 2 * half)
        nn.functional.cross_entropy(run(x[part]), y[part]).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    return [p.full_tensor().detach() if wrap == "fsdp" else p.detach() for p in model.parameters()]


def _alone(plan) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Bare(model, plan, steps=6, optimizer=optimizer)
    for x, y in (image_batches() * 2)[:6]:
        n = len(x) // 2 * 2
        nn.functional.cross_entropy(model(x[:n]), y[:n]).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    for name in first:
        want = _alone(PLANS[name.split()[0]])
        for a, b, c in zip(first[name], second[name], want):
            assert torch.equal(a, b), name
            torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
