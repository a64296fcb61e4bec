"""Distillation losses against their formulas, a distiller against a manual loss, and error messages."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from conftest import Net, image_batches
from rarefy.common.errors import ContainerError, DataError, ModelError, RecipeError, SelectorError
from rarefy.train import distill
from rarefy.train import distillation_losses as losses
from rarefy.train.distill import Distill, Distiller


class Deep(nn.Module):
    """Blocks of one width, with class outputs."""

    def __init__(self, blocks=4, width=8, classes=5):
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(blocks))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(self.drop(x))


def rows(n=12, c=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, generator=g), torch.randn(n, c, generator=g)


def test_kl_matches_its_formula_with_and_without_top():
    s, t = rows()
    p, q = (t / 2).softmax(-1), (s / 2).softmax(-1)
    want = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(losses.kl(s, t, 2.0), want)
    index = p.argsort(-1, descending=True)[:, :2]
    a, b = p.gather(-1, index), q.gather(-1, index)
    a, b = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (a, b))
    torch.testing.assert_close(losses.kl(s, t, 2.0, top=2), 4 * (a * (a / b).log()).sum(-1).mean())
    assert losses.kl(s, t, 2.0, top=9) == losses.kl(s, t, 2.0)


def test_hidden_losses_match_their_formulas():
    s, t = rows(c=8)
    torch.testing.assert_close(losses.squarehead(s, t), ((s - t) ** 2).mean() / (t**2).mean())
    torch.testing.assert_close(losses.cosine(s, t), 1 - (s * t).sum(1).div(s.norm(dim=1) * t.norm(dim=1)).mean())
    a, b = F.normalize(s, dim=1), F.normalize(t, dim=1)
    want = -torch.stack([((a[i] @ b.T) / 0.1).log_softmax(0)[i] for i in range(12)]).mean()
    torch.testing.assert_close(losses.contrastive(s, t), want)
    p, q = t.softmax(-1), s.softmax(-1)
    inter = 1 - torch.stack([torch.corrcoef(torch.stack([p[i], q[i]]))[0, 1] for i in range(12)]).mean()
    intra = 1 - torch.stack([torch.corrcoef(torch.stack([p[:, i], q[:, i]]))[0, 1] for i in range(8)]).mean()
    torch.testing.assert_close(losses.dist(s, t), inter + intra)


def test_relations_match_minilm():
    s, t = torch.randn(2, 4, 6), torch.randn(2, 4, 12)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    total = []
    for b in range(2):
        n = int(mask[b].sum())
        for i in range(n):
            each = []
            for h in range(2):
                p, q = (
                    ((x[b, i, h * d : h * d + d] @ x[b, :n, h * d : h * d + d].T) / math.sqrt(d)).softmax(-1)
                    for x, d in ((t, 6), (s, 3))
                )
                each.append((p * (p / q).log()).sum())
            total.append(torch.stack(each).mean())
    torch.testing.assert_close(losses.relations(s, t, 2, mask), torch.stack(total).mean())
    with pytest.raises(RecipeError, match="relations: 5 heads do not divide (6|12) features"):
        losses.relations(s, t, 5, mask)


def test_a_distiller_weights_its_losses():
    torch.manual_seed(0)
    student, teacher = Deep(2), Deep(4).train()
    x, y = torch.randn(7, 6), torch.randint(5, (7,))
    plan = Distill(task=0.5, logits=2.0, temperature=3.0, hidden="squarehead", hidden_weight=0.25)
    distiller = Distiller(student, teacher, plan, example=(x, y))
    out = student(x)
    got = distiller(out, (x, y), F.cross_entropy(out, y))
    assert teacher.training and teacher.drop.training  # as it was, although it answered without dropout
    teacher.eval()
    seen = {}
    for name, model in (("s", student), ("t", teacher)):
        hooks = [
            b.register_forward_hook(lambda m, a, o, k=(name, i): seen.__setitem__(k, o))
            for i, b in enumerate(model.blocks)
        ]
        seen[name] = model.eval()(x)
        for h in hooks:
            h.remove()
    hidden = [losses.squarehead(seen["s", i], seen["t", j]) for i, j in ((0, 1), (1, 3))]
    want = 2 * losses.kl(out, seen["t"], 3.0) + 0.25 * sum(hidden) / 2 + 0.5 * F.cross_entropy(out, y)
    torch.testing.assert_close(got, want)
    got.backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.stem.weight.grad is not None
    distiller.close()
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_embeddings_are_compared_as_retrieval_does(pooling, tmp_path):
    torch.manual_seed(0)
    s, t = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 6)
    batch = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": torch.tensor([[1, 1, 0, 0], [1] * 4, [1] * 4])}
    student, teacher = hf_like(last_hidden_state=s), hf_like(last_hidden_state=t)
    config = Distill(task=0, logits=0, embedding=2.0, similarity=3.0, pooling=pooling, cache=True)
    distiller = Distiller(student, teacher, config, example=batch, cache=tmp_path)
    counts = [2, 4, 4] if pooling == "mean" else [1] * 3
    a, b = (torch.stack([x[i, :n].mean(0) for i, n in enumerate(counts)]) for x in (s, t))
    cosines = torch.stack([F.cosine_similarity(a[i], b[i], dim=0) for i in range(3)])
    apart = [
        (F.cosine_similarity(a[i], a[j], dim=0) - F.cosine_similarity(b[i], b[j], dim=0)) ** 2
        for i in range(3)
        for j in range(3)
    ]
    want = 2 * (1 - cosines.mean()) + 3 * torch.stack(apart).mean()
    for _ in range(2):  # the second time from the cache, in half precision
        got = distiller(student(**batch), batch)
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    got.backward()
    assert s.grad.abs().sum() > 0


def test_blocks_are_matched_evenly_or_at_the_end():
    teacher, student = Deep(6), Deep(3)
    for depth, want in (("even", [1, 3, 5]), ("last", [3, 4, 5])):
        pairs = distill._hidden_pairs(student, teacher, Distill(hidden="mse", depth=depth))
        assert [list(teacher.blocks).index(t) for _, t in pairs] == want
        assert [s for s, _ in pairs] == list(student.blocks)


def test_a_projector_is_trained_where_widths_differ():
    torch.manual_seed(0)
    student, teacher, x = Deep(2, width=4), Deep(2, width=8), torch.randn(9, 6)
    distiller = Distiller(student, teacher, Distill(task=0, logits=0, hidden="mse"), example=x)
    assert [tuple(p.shape) for p in distiller.parameters()] == [(8, 4)] * 2
    before = [p.detach().clone() for p in distiller.parameters()]
    first = float(distiller(student(x), x).detach())
    report = rarefy.fit_(
        student, [x] * 30, distill=distiller, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), epochs=2
    )
    assert report.rows[-1]["loss"] < first / 2
    assert not any(torch.equal(a, b) for a, b in zip(before, distiller.parameters()))


def test_padding_and_unlabelled_tokens_do_not_count():
    out = torch.randn(2, 3, 5)
    mask, labels = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[-100, 1, 1], [2, 2, -100]])
    got = distill._rows(out, mask, labels)
    assert torch.equal(got, out[torch.tensor([[False, True, False], [True, True, False]])])
    image = torch.randn(2, 4, 3, 3)
    assert torch.equal(distill._rows(image, None)[10], image[1, :, 0, 1])


def test_each_sample_runs_through_the_teacher_once(tmp_path):
    torch.manual_seed(0)
    student, teacher = Deep(2).eval(), Deep(2)
    asked = []
    teacher.register_forward_hook(lambda m, a, o: asked.append(len(a[0])))
    xs = torch.randn(6, 6)
    plan = Distill(task=0, hidden="cosine", cache=True)
    distiller = Distiller(student, teacher, plan, cache=tmp_path / "answers")
    first = distiller(student(xs[:4]), xs[:4])
    again = distiller(student(xs[:4]), xs[:4])
    order = torch.tensor([3, 0, 2])
    mixed = distiller(student(xs[order]), xs[order])
    assert asked == [4] and torch.equal(first, again)
    free = Distiller(student, teacher, Distill(task=0, hidden="cosine"))
    torch.testing.assert_close(mixed, free(student(xs[order]), xs[order]), atol=1e-3, rtol=1e-3)
    distiller(student(xs[3:]), xs[3:])
    assert len(list((tmp_path / "answers").glob("*.safetensors"))) == 6
    for file in (tmp_path / "answers").glob("*.safetensors"):
        file.write_bytes(b"nonsense")
    with pytest.raises(ContainerError, match="is damaged .* remove it, and the teacher runs again"):
        distiller(student(xs[:4]), xs[:4])


def test_distillation_moves_the_student_towards_the_teacher():
    torch.manual_seed(0)
    teacher = Net().eval()
    student = rarefy.fold_(copy.deepcopy(teacher))
    rarefy.prune_(student, sparsity=0.7)
    data = [x for x, _ in image_batches()]
    far = float(sum(F.mse_loss(student(x), teacher(x)) for x in data).detach())
    with torch.enable_grad():
        distiller = Distiller(student, teacher, Distill(task=0.0, by="mse"), example=data[0])
        rarefy.fit_(student, data, epochs=20, distill=distiller, optimizer=lambda p: torch.optim.Adam(p, lr=5e-3))
    distiller.close()
    assert float(sum(F.mse_loss(student(x), teacher(x)) for x in data).detach()) < far / 4
    assert int((student.hidden.weight == 0).sum()) == round(0.7 * 128)


def hf_like(**named):
    class Model(nn.Module):
        def forward(self, input_ids=None, **_):
            return SimpleNamespace(**named)

    return Model()


BAD = {
    "no module": (lambda: Distiller(Net(), "teacher/"), ModelError, "teacher: expected a torch.nn.Module, got 'teacher/'"),
    "itself": (lambda: (lambda m: Distiller(m, m))(Net()), ModelError, "student and teacher are one model"),
    "classes": (lambda: Distiller(Deep(classes=5), Deep(classes=7), example=torch.randn(2, 6)), ModelError, "outputs do not match: the student .Deep. gives float32 2x5, the teacher .Deep. float32 2x7"),
    "features": (lambda: _lost(Deep(2, width=4), Deep(2), Distill(task=0, logits=0, hidden="mse")), ModelError, "hidden states of student and teacher do not match.*prepare"),
    "deeper": (lambda: Distiller(Deep(4), Deep(2), Distill(hidden="mse")), ModelError, "the student has 4 hidden states, more than the teacher's 2"),
    "no blocks": (lambda: Distiller(Net(), Net(), Distill(hidden="mse")), ModelError, "Net has no list of equal blocks: name modules with at"),
    "no such module": (lambda: Distiller(Net(), Net(), Distill(hidden="mse", at="layer*")), SelectorError, "at: layer. matches no module of Net"),
    "nothing": (lambda: Distiller(Net(), Net(), Distill(logits=0)), RecipeError, "the teacher has no effect"),
    "by": (lambda: Distiller(Net(), Net(), Distill(by="kll")), RecipeError, "unknown by 'kll'.*did you mean 'kl'"),
    "hidden": (lambda: Distiller(Net(), Net(), Distill(hidden="squareheat")), RecipeError, "did you mean 'squarehead'"),
    "weight": (lambda: Distiller(Net(), Net(), Distill(logits=-1)), RecipeError, "logits: expected a number of at least 0, got -1"),
    "temperature": (lambda: Distiller(Net(), Net(), Distill(temperature=0)), RecipeError, "temperature: expected a number above 0, got 0"),
    "top": (lambda: Distiller(Net(), Net(), Distill(by="mse", top=3)), RecipeError, "top has no effect: it selects classes"),
    "at without hidden": (lambda: Distiller(Net(), Net(), Distill(at="x")), RecipeError, "at has no effect without hidden"),
    "pooling": (lambda: Distiller(Net(), Net(), Distill(pooling="first")), RecipeError, "pooling has no effect without embedding or similarity"),
    "images": (lambda: Distiller(hf_like(last_hidden_state=torch.ones(1, 2, 3, 3)), hf_like(last_hidden_state=torch.ones(1, 2, 3, 3)), Distill(logits=0, embedding=1), example={"input_ids": torch.ones(1, 2).long()}), ModelError, "pool hidden states .batch, tokens, features., but the model returns"),
    "no labels": (lambda: _lost(Net(), Net(), Distill()), DataError, "task > 0 needs the model's own loss"),
    "one number": (lambda: _lost(nn.Linear(6, 1), nn.Linear(6, 1), Distill(task=0)), ModelError, "one number per row, which is no distribution for kl: use by='mse'"),
    "hidden states": (lambda: Distiller(hf_like(last_hidden_state=torch.ones(1, 2, 3)), hf_like(last_hidden_state=torch.ones(1, 2, 3)), example={"input_ids": torch.ones(1, 2).long()}), ModelError, "returns hidden states, no logits: use logits=0"),
    "relations": (lambda: Distiller(Deep(), Deep(), Distill(relations=1.0)), ModelError, "Deep has none"),
    "cache": (lambda: Distiller(Net(), Net(), Distill(cache=True)), RecipeError, "give Distiller.*cache=FOLDER"),
    "not called": (lambda: Distiller(Deep(), Deep(), Distill(task=0, hidden="mse"))(torch.randn(2, 5), torch.randn(2, 6)), ModelError, "the student was not called before its loss"),
}  # fmt: skip


def _lost(student, teacher, plan):
    x = torch.randn(2, 6) if not isinstance(student, Net) else image_batches()[0][0]
    return Distiller(student, teacher, plan)(student(x), x)


@pytest.mark.parametrize("case", BAD)
def test_messages_for_models_that_do_not_match(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


def test_old_parameter_names_name_the_new_ones():
    student, teacher, x = nn.Linear(6, 3), nn.Linear(6, 3), torch.randn(4, 6)
    with pytest.raises(TypeError, match="no parameter 'plan': it is called 'config' now"):
        Distiller(student, teacher, plan=Distill(task=0))  # type: ignore[call-arg]
    distiller = Distiller(student, teacher, Distill(task=0))
    with pytest.raises(TypeError, match="no parameter 'own': it is called 'task_loss' now"):
        distiller(student(x), x, own=None)


@pytest.mark.parametrize("by", ["kl", "dist", "mse"])
def test_answers_are_learned_from_starts_and_ends(by):
    """Of a model that finds answers: the mean loss of both, over real tokens alone."""
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32}
    student, teacher = (
        BertForQuestionAnswering(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)).eval()
        for _ in range(2)
    )
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[:2, 9:] = 0
    batch = {"input_ids": torch.randint(1, 64, (4, 12)), "attention_mask": mask}
    distiller = rarefy.Distiller(student, teacher, rarefy.Distill(task=0.0, logits=1.0, by=by), example=batch)
    loss = float(distiller(student(**batch), batch).detach())
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(mask == 0, 5)}  # what stands at padding
    assert float(distiller(student(**other), other).detach()) == pytest.approx(loss, rel=1e-4) and loss > 0
    data = [{**batch, "start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([2, 3, 4, 5])}]
    distiller.close()
    rarefy.compress_(student, {"stages": [{"train": {"epochs": 1, "distill": {"logits": 1.0, "by": by}}}]}, data)


def test_teachers_that_find_answers_are_cached(tmp_path):
    """Their logits are of starts and of ends: two rows for each sample."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    teacher, student = (transformers.BertForQuestionAnswering(config) for _ in range(2))
    batch = {"input_ids": torch.randint(0, 60, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    losses = []
    for cache in (None, tmp_path, tmp_path):
        distiller = Distiller(student, teacher, Distill(task=0.0, logits=1.0), cache=cache)
        losses.append(float(distiller(student.eval()(**batch), batch, None).detach()))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-2)
