"""Learning from a teacher: losses between the outputs, hidden states and attention of two models.

s, t    the student's and the teacher's, [rows, features] of real tokens or samples
kl          KL(t || s) of softened outputs, times T^2 (Hinton 2015)
mse         mean squared difference
dist        1 - correlation, within samples and within classes (DIST, Huang 2022)
squarehead  MSE(s, t) / MSE(0, t), each layer on its own scale (Kurtic 2023)
cosine      1 - cosine of rows
contrastive each row finds its own among the batch's rows (InfoNCE; CRD, Tian 2020, with the batch as negatives)
relations   KL between softmax(A A' / sqrt d) for A of queries, keys and values each (MiniLMv2, Wang 2021, eq. 3)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.calibration.resume import digest
from rarefy.calibration.sequential import find_blocks, first_tensor
from rarefy.common.errors import DataError, ModelError, RecipeError, SelectorError, unknown
from rarefy.model.batches import tensors_in
from rarefy.model.forward import call, describe_batch, evaluating
from rarefy.model.layers import all_layers
from rarefy.model.masks import fold_
from rarefy.train.teacher_cache import TeacherCache

Words = str | Sequence[str] | None


def kl(s: Tensor, t: Tensor, T: float = 1.0, top: int | None = None) -> Tensor:
    """Return KL(t || s) at temperature T, times T^2, mean over rows; with `top` over the teacher's most likely classes
    and one for all others together.

    >>> float(kl(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]])))
    0.0
    """
    p, q = F.log_softmax(t.float() / T, -1), F.log_softmax(s.float() / T, -1)
    if top is not None and top < p.shape[-1]:
        p, index = p.topk(top, -1)
        p, q = _with_rest(p), _with_rest(q.gather(-1, index))
    return T * T * F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()


def _with_rest(log_p: Tensor) -> Tensor:
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-9).log()
    return torch.cat([log_p, rest], -1)


def mse(s: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(s.float(), t.float())


def squarehead(s: Tensor, t: Tensor) -> Tensor:
    return mse(s, t) / t.float().square().mean().clamp(min=1e-12)


def cosine(s: Tensor, t: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(s.float(), t.float(), dim=-1)).mean()


def contrastive(s: Tensor, t: Tensor, T: float = 0.1, most: int = 512) -> Tensor:
    a, b = (F.normalize(x.float()[:most], dim=-1) for x in (s, t))
    return F.cross_entropy(a @ b.T / T, torch.arange(len(a), device=a.device))


def dist(s: Tensor, t: Tensor, T: float = 1.0) -> Tensor:
    p, q = (F.softmax(x.float() / T, -1) for x in (t, s))
    return T * T * (_apart(q, p) + (_apart(q.T, p.T) if len(q) > 1 else 0))


def _apart(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    return (1 - F.cosine_similarity(a, b, dim=-1)).mean()


def relations(s: Tensor, t: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """s, t [batch, tokens, features]: KL between how tokens relate to each other, mean over heads and real tokens."""

    def related(x: Tensor) -> Tensor:
        B, n, C = x.shape
        if C % heads:
            raise RecipeError(f"relations in {heads} heads do not divide {C} features: give heads that do")
        x = x.float().reshape(B, n, heads, C // heads).transpose(1, 2)
        scores = x @ x.transpose(-1, -2) / math.sqrt(C // heads)
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None, None, :], float("-inf"))
        return F.log_softmax(scores, -1)

    p, q = related(t), related(s)
    each = torch.where(p.isneginf(), 0.0, p.exp() * (p - q).nan_to_num(0.0)).sum(-1).mean(1)
    return each.mean() if mask is None else each[mask.bool()].mean()


OUTPUTS: dict[str, Callable[..., Tensor]] = {"kl": kl, "mse": mse, "dist": dist}
HIDDEN: dict[str, Callable[..., Tensor]] = {
    "mse": mse, "squarehead": squarehead, "cosine": cosine, "contrastive": contrastive,
}  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin")  # data, not code


@dataclass(frozen=True, kw_only=True)
class Distill:
    """What a student learns from its teacher. Weights of 0 leave a part out.

    task        weight of the model's own loss
    logits      weight of the outputs' loss, `by` kl, mse or dist; `temperature` softens, `top` looks at the teacher's
                most likely classes only (large vocabularies)
    hidden      mse, squarehead, cosine or contrastive between the outputs of blocks, weight `hidden_weight`
    at          the modules whose outputs are hidden states (default: the model's equal blocks); `teacher_at` theirs
    depth       how blocks are matched where the student has fewer: `even` or `last`
    relations   weight of the relations of queries, keys and values, in `heads` heads, of the last block
    cache       keep the teacher's answers on disk, so that each sample is asked about once: for data that does not
                change from epoch to epoch
    teacher     (recipes) the folder of another teacher than the model itself was
    """

    task: float = 1.0
    logits: float = 1.0
    by: str = "kl"
    temperature: float = 1.0
    top: int | None = None
    hidden: str | None = None
    hidden_weight: float = 1.0
    at: Words = None
    teacher_at: Words = None
    depth: str = "even"
    relations: float = 0.0
    heads: int = 12
    teacher: str | None = None
    cache: bool = False


def check(plan: Distill) -> None:
    """Raise RecipeError for what is impossible or would have no effect."""
    for name, word, known in (("by", plan.by, OUTPUTS), ("hidden", plan.hidden, HIDDEN), ("depth", plan.depth, DEPTHS)):
        if word is not None and word not in known:
            raise RecipeError(unknown(name, word, known))
    for name in ("task", "logits", "hidden_weight", "relations"):
        value = getattr(plan, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise RecipeError(f"{name} is a weight from 0 up, got {value!r}")
    if not plan.temperature > 0:
        raise RecipeError(f"temperature is greater than 0, got {plan.temperature!r}")
    if plan.top is not None and (plan.by != "kl" or not plan.logits or plan.top < 1):
        raise RecipeError("top keeps the likeliest classes of logits by kl, at least 1: it has no effect here")
    if (plan.at is not None or plan.teacher_at is not None) and plan.hidden is None:
        raise RecipeError("at names modules for hidden: give hidden, such as squarehead, or leave at out")
    if not (plan.logits or (plan.hidden and plan.hidden_weight) or plan.relations):
        raise RecipeError("nothing is learnt from the teacher: give logits, hidden or relations")


class Distiller(nn.Module):
    """The loss of a student with its teacher: `distiller(output, batch, own_loss)` after the student's call.

    The teacher runs without gradients, in evaluation mode; its answers are kept in the folder `cache`, if given, one
    file a sample. `example`, a batch, checks that both models match before training begins. Where widths of hidden
    states differ, a projector learns along (FitNets, Romero 2015): its parameters are `distiller.parameters()`.

    >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> distiller, x = Distiller(student, teacher, Distill(task=0.0)), torch.randn(2, 4)
    >>> bool(distiller(student(x), x) > 0)
    True
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        plan: Distill | None = None,
        *,
        example: Any = None,
        cache: str | Path | None = None,
    ):
        super().__init__()
        for name, side in (("student", student), ("teacher", teacher)):
            if not isinstance(side, nn.Module):
                raise ModelError(f"the {name} is a torch.nn.Module, got {side!r}; rarefy.load(path) reads one")
        if student is teacher:
            raise ModelError("student and teacher are one model: give a copy as it was, copy.deepcopy(model)")
        plan, self.prepared = plan or Distill(), False
        check(plan)
        if plan.cache and cache is None:
            raise RecipeError("cache keeps the teacher's answers in a folder: give Distiller(..., cache=FOLDER)")
        self.plan, self.task = plan, plan.task
        self._models = (student, teacher)  # a tuple, so that neither is a part of this module
        self._pairs = _pairs(student, teacher, plan) if plan.hidden else []
        self._related = _related(student, teacher) if plan.relations else []
        self.projectors = nn.ModuleDict()
        self._seen: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        self._answers = None
        if cache is not None:
            asked = {
                k: v
                for k, v in asdict(plan).items()
                if k in ("logits", "hidden", "relations", "at", "teacher_at", "depth")
            }
            places = [len(self._pairs), len(self._related)]
            who = digest([repr(asked), places, dict(teacher.state_dict())])
            self._answers = TeacherCache(Path(cache).expanduser(), who)
        self._stack = ExitStack()
        for side in (0, 1):
            wanted = [pair[side] for pair in (*self._pairs, *self._related)]
            for module in {id(m): m for m in wanted}.values():
                self._stack.callback(module.register_forward_hook(self._watch(side)).remove)
        try:
            if example is not None:
                self.prepare(example)
        except BaseException:
            self.close()
            raise

    def join(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer train the projectors too, if there are any and it does not yet."""
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        new = [p for p in self.parameters() if id(p) not in held]
        if new:
            optimizer.add_param_group({"params": new})

    def close(self) -> None:
        """Take the hooks off both models."""
        self._stack.close()

    @torch.no_grad()
    def prepare(self, example: Any) -> None:
        """Call both models once, and make projectors where widths differ; ModelError where outputs do not match."""
        student, teacher = self._models
        with evaluating(student):
            out = call(student, example)
        told = self._asked(example)
        if self.plan.logits:
            _same(_logits(out), told["logits"], student, teacher)
        for index, pair in enumerate(self._pairs):
            s, t = self._seen[0][id(pair[0])], told[f"hidden.{index}"]
            if s.shape[:-1] != t.shape[:-1] and s.dim() < 4:
                raise ModelError(
                    f"hidden states of student and teacher have {tuple(s.shape)} and {tuple(t.shape)} entries: name "
                    "modules whose outputs match with at and teacher_at"
                )
            axis = 1 if s.dim() >= 4 else -1
            if s.shape[axis] != t.shape[axis]:
                self.projectors[str(index)] = _projector(s.shape[axis], t.shape[axis], index).to(s.device)
        self._seen[0].clear()
        self.prepared = True

    def forward(self, out: Any, batch: Any, own: Tensor | None = None) -> Tensor:
        """Return the loss. `out` is the student's output for `batch`, `own` its own loss (needed where task > 0)."""
        plan = self.plan
        told = self._asked(batch)
        mask = batch.get("attention_mask") if hasattr(batch, "keys") else None
        parts = []
        if plan.task:
            if own is None:
                raise DataError("task > 0 takes the model's own loss: give labels, or task=0 for the teacher alone")
            parts.append(plan.task * own)
        if plan.logits:
            s, t = _logits(out), told["logits"]
            _same(s, t, *self._models)
            labels = batch.get("labels") if hasattr(batch, "keys") and s.dim() == 3 else None
            if labels is not None and _causal(self._models[0]):  # a row of outputs is about the next token
                labels = F.pad(labels[:, 1:], (0, 1), value=-100)
            parts.append(plan.logits * self._outputs(_rows(s, mask, labels), _rows(t, mask, labels)))
        if plan.hidden:
            each = []
            for index, pair in enumerate(self._pairs):
                s, t = _rows(self._own(pair[0]), mask), _rows(told[f"hidden.{index}"], mask)
                if str(index) in self.projectors:
                    s = self.projectors[str(index)](s.float())
                if s.shape != t.shape:
                    raise ModelError(
                        f"hidden states of student and teacher do not match: {tuple(s.shape)} and {tuple(t.shape)} "
                        "(rows, features); Distiller.prepare(batch) makes projectors where only the features differ"
                    )
                each.append(HIDDEN[plan.hidden](s, t))
            parts.append(plan.hidden_weight * torch.stack(each).mean())
        if plan.relations:
            each = [
                relations(self._own(pair[0]), told[f"related.{i}"], plan.heads, mask)
                for i, pair in enumerate(self._related)
            ]
            parts.append(plan.relations * torch.stack(each).mean())
        self._seen[0].clear()
        return torch.stack([p.float() for p in parts]).sum()

    def _outputs(self, s: Tensor, t: Tensor) -> Tensor:
        by, T = self.plan.by, self.plan.temperature
        if s.shape[-1] == 1 and by != "mse":
            raise ModelError(f"the models give one number, which has no distribution for {by}: take by='mse'")
        if by == "kl":
            return kl(s, t, T, self.plan.top)
        return dist(s, t, T) if by == "dist" else mse(s, t)

    def _own(self, module: nn.Module) -> Tensor:
        found = self._seen[0].get(id(module))
        if found is None:
            raise ModelError("the student was not called before its loss: distiller(model(batch), batch)")
        return found

    def _watch(self, side: int) -> Any:
        def see(module: nn.Module, args: tuple, out: Any) -> None:
            self._seen[side][id(module)] = first_tensor(out)

        return see

    @torch.no_grad()
    def _asked(self, batch: Any) -> dict[str, Tensor]:
        """The teacher's answers to a batch, from the cache where it has them."""
        if self._answers is None:
            return self._ask(batch)
        place = tensors_in(batch)[0].device
        return {k: v.to(place) for k, v in self._answers.of(batch, self._ask).items()}

    def _ask(self, batch: Any) -> dict[str, Tensor]:
        teacher = self._models[1]
        if hasattr(batch, "keys") and "labels" in batch:
            batch = {k: batch[k] for k in batch if k != "labels"}
        with evaluating(teacher), torch.no_grad():
            out = call(teacher, batch)
        told = {"logits": _logits(out).detach()} if self.plan.logits else {}
        seen = self._seen[1]
        told.update({f"hidden.{i}": seen[id(p[1])].detach() for i, p in enumerate(self._pairs)})
        told.update({f"related.{i}": seen[id(p[1])].detach() for i, p in enumerate(self._related)})
        seen.clear()
        return told


def _projector(inputs: int, outputs: int, seed: int) -> nn.Linear:
    """A linear map that begins the same in every run."""
    made = nn.Linear(inputs, outputs, bias=False)
    noise = torch.rand(made.weight.shape, generator=torch.Generator().manual_seed(seed))
    made.weight.data.copy_((2 * noise - 1) / math.sqrt(inputs))
    return made


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy to learn from: masks and grids written into its weights, in evaluation mode."""
    twin = fold_(copy.deepcopy(model)).eval()
    for p in twin.parameters():
        p.requires_grad_(False)
    return twin


def even(students: int, teachers: int) -> list[int]:
    """Return the teacher's block for each of the student's: the last for the last, the others evenly.

    >>> even(3, 6), even(2, 2)
    ([1, 3, 5], [0, 1])
    """
    return [(i + 1) * teachers // students - 1 for i in range(students)]


def last(students: int, teachers: int) -> list[int]:
    """Return the teacher's last blocks, in order.

    >>> last(2, 6)
    [4, 5]
    """
    return list(range(teachers - students, teachers))


DEPTHS = {"even": even, "last": last}


def _pairs(student: nn.Module, teacher: nn.Module, plan: Distill) -> list[tuple[nn.Module, nn.Module]]:
    """The modules whose outputs are compared."""
    ours = _places(student, plan.at)
    theirs = _places(teacher, plan.teacher_at if plan.teacher_at is not None else plan.at)
    if len(ours) > len(theirs):
        raise ModelError(
            f"the student has {len(ours)} hidden states and the teacher {len(theirs)}: a student has no more; name "
            "which with at and teacher_at"
        )
    return [(m, theirs[j]) for m, j in zip(ours, DEPTHS[plan.depth](len(ours), len(theirs)))]


def _places(model: nn.Module, words: Words) -> list[nn.Module]:
    if words is None:
        try:
            return [b.module for b in find_blocks(model, all_layers(model))]
        except ModelError:
            raise ModelError(
                f"{type(model).__name__} has no list of equal blocks: name modules with at, such as at='layer*'"
            ) from None
    globs = [words] if isinstance(words, str) else list(words)
    found = [m for n, m in model.named_modules() if any(fnmatchcase(n, g) for g in globs)]
    if not found:
        raise SelectorError(f"at: {', '.join(globs)} matches no module of {type(model).__name__}")
    return found


def _related(student: nn.Module, teacher: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Projections of queries, keys and values of the last block of each."""
    sides = []
    for model in (student, teacher):
        found = {}
        for name, module in model.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in PROJECTIONS and isinstance(module, nn.Linear):
                found[leaf[0]] = module  # queries, keys, values: the last of each
        if len(found) != 3:
            raise ModelError(
                f"relations need a model's projections of queries, keys and values ({', '.join(PROJECTIONS)}): "
                f"{type(model).__name__} has {', '.join(found) or 'none'}"
            )
        sides.append([found[role] for role in "qkv"])
    return list(zip(*sides))


def _logits(out: Any) -> Tensor:
    found = getattr(out, "logits", None)
    if found is None and hasattr(out, "last_hidden_state"):
        raise ModelError("the model gives hidden states, no logits: take logits=0 and hidden='squarehead'")
    return first_tensor(out) if found is None else found


def _rows(x: Tensor, mask: Tensor | None, labels: Tensor | None = None) -> Tensor:
    """[..., features] -> [real tokens, features]; images [B, C, H, W] as rows of C features."""
    if x.dim() >= 4:
        return x.flatten(2).transpose(1, 2).flatten(0, 1)
    told = [t for t in (mask, None if labels is None else labels != -100) if t is not None and t.shape == x.shape[:2]]
    if x.dim() == 3 and told:
        return x[torch.stack([t.bool() for t in told]).all(0)]
    return x.flatten(0, -2) if x.dim() > 2 else x


def _causal(model: nn.Module) -> bool:
    """Whether a language model's outputs are about the next token."""
    able = getattr(model, "can_generate", None)
    return bool(able and able())


def _same(s: Tensor, t: Tensor, student: nn.Module, teacher: nn.Module) -> None:
    if s.shape != t.shape:
        raise ModelError(
            f"outputs do not match: the student ({type(student).__name__}) gives {describe_batch(s)}, the teacher "
            f"({type(teacher).__name__}) {describe_batch(t)}"
        )
