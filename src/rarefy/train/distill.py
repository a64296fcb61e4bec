"""Distillation: what a student learns from its teacher, and the loss of both."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from rarefy.calibration.resume import digest
from rarefy.calibration.sequential import find_blocks
from rarefy.common.errors import DataError, ModelError, RecipeError, SelectorError
from rarefy.common.options import Names, OneOf, Options, Positive, at
from rarefy.common.renamed import renamed_parameters
from rarefy.model.batches import first_tensor, tensors_in
from rarefy.model.forward import call, describe_batch, evaluating
from rarefy.model.layers import all_layers
from rarefy.model.masks import fold_
from rarefy.train.distillation_losses import (
    HIDDEN,
    OUTPUTS,
    POOLINGS,
    cosine,
    dist,
    kl,
    mse,
    pool,
    relations,
    similarity,
)
from rarefy.train.teacher_cache import TeacherCache

Words = str | Sequence[str] | None


ANSWERS = "answers"  # logits of starts and ends, [batch, 2, tokens]
NEVER = -1e4  # logit of what cannot be
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin")  # data, not code


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

Weight = Annotated[float, Field(ge=0)]


class Distill(Options):
    """What a student learns from its teacher. A weight of 0 leaves that part of the loss out.

    Example:
        >>> Distill(hidden="squarehead").by
        'kl'
        >>> Distill(logits=0)
        Traceback (most recent call last):
        rarefy.common.errors.RecipeError: the teacher has no effect: give logits, ...
    """

    task: Weight = Field(default=1.0, description="weight of the model's own loss")
    logits: Weight = Field(default=1.0, description="weight of the loss between the outputs")
    by: Annotated[str, OneOf(OUTPUTS)] = Field(default="kl", description="loss between the outputs")
    temperature: float = Field(default=1.0, gt=0, description="softens the outputs (kl, dist)")
    top: Positive | None = Field(
        default=None, description="kl: only the teacher's most likely classes, for large vocabularies"
    )
    hidden: Annotated[str, OneOf(HIDDEN)] | None = Field(default=None, description="loss between the outputs of blocks")
    hidden_weight: Weight = Field(default=1.0, description="weight of that loss")
    at: Names | None = Field(
        default=None, description="modules whose outputs are hidden states; by default the equal blocks"
    )
    teacher_at: Names | None = Field(default=None, description="those of the teacher; by default the same")
    depth: Annotated[str, OneOf(DEPTHS)] = Field(
        default="even", description="how blocks are matched where the student has fewer"
    )
    relations: Weight = Field(
        default=0.0, description="weight of the relations of queries, keys and values of the last block"
    )
    heads: Positive = Field(default=12, description="how many heads the relations have")
    embedding: Weight = Field(
        default=0.0, description="weight of 1 - cosine of the pooled outputs: for models of text embeddings"
    )
    similarity: Weight = Field(
        default=0.0, description="weight of the differences between the cosines of all pairs of texts in a batch"
    )
    pooling: Annotated[str, OneOf(POOLINGS)] = Field(
        default="mean", description="how outputs of tokens become an embedding: mean of real tokens, or the first one"
    )
    teacher: str | None = Field(
        default=None,
        description="recipes: folder of the teacher; by default the model before the first stage",
    )
    cache: bool = Field(
        default=False, description="keep the teacher's outputs on disk, for data that is the same in each epoch"
    )

    @model_validator(mode="after")
    def _check_combination(self) -> Distill:
        if self.top is not None and (self.by != "kl" or not self.logits):
            with at("top"):
                raise RecipeError("top has no effect: it selects classes for logits by kl only")
        for name in ("at", "teacher_at"):
            if getattr(self, name) is not None and self.hidden is None:
                with at(name):
                    raise RecipeError(
                        f"{name} has no effect without hidden: give hidden, such as squarehead, or leave {name} out"
                    )
        if self.pooling != "mean" and not self.pools:
            with at("pooling"):
                raise RecipeError("pooling has no effect without embedding or similarity: give one of them a weight")
        if not (self.logits or (self.hidden and self.hidden_weight) or self.relations or self.pools):
            with at("logits"):
                raise RecipeError("the teacher has no effect: give logits, hidden, relations, embedding or similarity")
        return self

    @property
    def pools(self) -> bool:
        """Return whether embeddings are compared."""
        return bool(self.embedding or self.similarity)


class Distiller(nn.Module):
    """The loss of a student with its teacher: call `distiller(output, batch, own_loss)` after the student.

    The teacher runs without gradients, in evaluation mode. Where widths of hidden states differ, a linear projector is
    trained along (FitNets, Romero 2015): its parameters are `distiller.parameters()`.

    Args:
        student: The model that is trained.
        teacher: The model to learn from; not the same object as the student.
        config: Which losses with which weights; by default `Distill()`.
        example: A batch. With it, both models are checked to match before training begins, and projectors are made.
        cache: Folder for the teacher's outputs, one file a sample; each sample then runs through the teacher once.

    Raises:
        ModelError: The models do not match.
        RecipeError: The config is impossible.
        SelectorError: `at` or `teacher_at` names no module.

    Example:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> distiller, x = Distiller(student, teacher, Distill(task=0.0)), torch.randn(2, 4)
        >>> bool(distiller(student(x), x) > 0)
        True
    """

    @renamed_parameters(plan="config")
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: Distill | None = None,
        *,
        example: Any = None,
        cache: str | Path | None = None,
    ):
        super().__init__()
        for name, side in (("student", student), ("teacher", teacher)):
            if not isinstance(side, nn.Module):
                raise ModelError(f"{name}: expected a torch.nn.Module, got {side!r}; rarefy.load(path) returns one")
        if student is teacher:
            raise ModelError("student and teacher are one model: give a copy as it was, copy.deepcopy(model)")
        if isinstance(config, Mapping):
            config = Distill(**config)
        if config is not None and not isinstance(config, Distill):
            raise RecipeError(f"config: expected rarefy.Distill(...), got {type(config).__name__}")
        config, self.prepared = config or Distill(), False
        if config.cache and cache is None:
            raise RecipeError("cache needs a folder for the teacher's outputs: give Distiller(..., cache=FOLDER)")
        self.config, self.task = config, config.task
        self._models = (student, teacher)  # a tuple, so that neither is a part of this module
        self._pairs = _hidden_pairs(student, teacher, config) if config.hidden else []
        self._projections = _projection_pairs(student, teacher) if config.relations else []
        self.projectors = nn.ModuleDict()
        self._activations: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        self._cache = None
        if cache is not None:
            config_key = {
                k: v
                for k, v in config.model_dump().items()
                if k in ("logits", "hidden", "relations", "at", "teacher_at", "depth")
            }
            if config.pools:
                config_key["pooling"] = config.pooling
            pair_counts = [len(self._pairs), len(self._projections)]
            teacher_digest = digest([repr(config_key), pair_counts, dict(teacher.state_dict())])
            self._cache = TeacherCache(Path(cache).expanduser(), teacher_digest)
        self._stack = ExitStack()
        for side in (0, 1):
            modules = [pair[side] for pair in (*self._pairs, *self._projections)]
            for module in {id(m): m for m in modules}.values():
                self._stack.callback(module.register_forward_hook(self._recorder(side)).remove)
        try:
            if example is not None:
                self.prepare(example)
        except BaseException:
            self.close()
            raise

    def join(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the projectors to an optimizer, if there are any and it does not have them yet."""
        present = {id(p) for g in optimizer.param_groups for p in g["params"]}
        new = [p for p in self.parameters() if id(p) not in present]
        if new:
            optimizer.add_param_group({"params": new})

    def close(self) -> None:
        """Remove the hooks from both models."""
        self._stack.close()

    @torch.no_grad()
    def prepare(self, example: Any) -> None:
        """Run both models on a batch, and make projectors where widths differ.

        Raises ModelError where outputs do not match.
        """
        student, teacher = self._models
        with evaluating(student):
            out = call(student, example)
        targets = self._teacher_outputs(example)
        if self.config.logits:
            _check_same_shape(_logits(out), targets["logits"], student, teacher)
        if self.config.pools:
            _check_same_shape(_embeddings(out, example, self.config.pooling), targets["pooled"], student, teacher)
        for index, pair in enumerate(self._pairs):
            s, t = self._activations[0][id(pair[0])], targets[f"hidden.{index}"]
            if s.shape[:-1] != t.shape[:-1] and s.dim() < 4:
                raise ModelError(
                    f"hidden states of student and teacher have {tuple(s.shape)} and {tuple(t.shape)} entries: name "
                    "modules whose outputs match with at and teacher_at"
                )
            axis = 1 if s.dim() >= 4 else -1
            if s.shape[axis] != t.shape[axis]:
                self.projectors[str(index)] = _projector(s.shape[axis], t.shape[axis], index).to(s.device)
        self._activations[0].clear()
        self.prepared = True

    @renamed_parameters(own="task_loss")
    def forward(self, out: Any, batch: Any, task_loss: Tensor | None = None) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            out: The student's output for the batch.
            batch: The batch, which the teacher runs on.
            task_loss: The student's own loss; needed where `task` > 0.

        Raises:
            DataError: `task` > 0, and there is no task loss.
            ModelError: The student was not called on the batch, or outputs do not match.
        """
        config = self.config
        targets = self._teacher_outputs(batch)
        mask = batch.get("attention_mask") if hasattr(batch, "keys") else None
        terms = []
        if config.task:
            if task_loss is None:
                raise DataError("task > 0 needs the model's own loss: give labels, or task=0 for the teacher alone")
            terms.append(config.task * task_loss)
        if config.logits:
            terms.append(config.logits * self._logits_loss(out, targets["logits"], batch, mask))
        if config.hidden:
            terms.append(config.hidden_weight * self._hidden_loss(config.hidden, targets, mask))
        if config.relations:
            losses = [
                relations(self._student_activation(pair[0]), targets[f"related.{i}"], config.heads, mask)
                for i, pair in enumerate(self._projections)
            ]
            terms.append(config.relations * torch.stack(losses).mean())
        if config.pools:
            pooled = _embeddings(out, batch, config.pooling)
            for weight, loss in ((config.embedding, cosine), (config.similarity, similarity)):
                if weight:
                    terms.append(weight * loss(pooled, targets["pooled"]))
        self._activations[0].clear()
        return torch.stack([t.float() for t in terms]).sum()

    def _logits_loss(self, out: Any, t: Tensor, batch: Any, mask: Tensor | None) -> Tensor:
        """Return the loss between outputs, over real tokens with labels."""
        s = _logits(out)
        _check_same_shape(s, t, *self._models)
        if hasattr(out, "start_logits") and mask is not None:  # answers are among real tokens
            s, t = (x.masked_fill(~torch.cat([mask, mask]).bool(), NEVER) for x in (s, t))
        labels = batch.get("labels") if hasattr(batch, "keys") and s.dim() == 3 else None
        if labels is not None and _causal(self._models[0]):  # outputs at a position predict the next token
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return self._output_loss(_rows(s, mask, labels), _rows(t, mask, labels))

    def _hidden_loss(self, kind: str, targets: dict[str, Tensor], mask: Tensor | None) -> Tensor:
        """Return the mean loss between hidden states, projected where widths differ."""
        losses = []
        for index, pair in enumerate(self._pairs):
            s, t = _rows(self._student_activation(pair[0]), mask), _rows(targets[f"hidden.{index}"], mask)
            if str(index) in self.projectors:
                s = self.projectors[str(index)](s.float())
            if s.shape != t.shape:
                raise ModelError(
                    f"hidden states of student and teacher do not match: {tuple(s.shape)} and {tuple(t.shape)} "
                    "(rows, features); Distiller.prepare(batch) makes projectors where only the features differ"
                )
            losses.append(HIDDEN[kind](s, t))
        return torch.stack(losses).mean()

    def _output_loss(self, s: Tensor, t: Tensor) -> Tensor:
        """Return the loss between rows of outputs."""
        by, T = self.config.by, self.config.temperature
        if s.shape[-1] == 1 and by != "mse":
            raise ModelError(f"the models return one number per row, which is no distribution for {by}: use by='mse'")
        if by == "kl":
            return kl(s, t, T, self.config.top)
        return dist(s, t, T) if by == "dist" else mse(s, t)

    def _student_activation(self, module: nn.Module) -> Tensor:
        """Return what the hook recorded of a student's module."""
        activation = self._activations[0].get(id(module))
        if activation is None:
            raise ModelError("the student was not called before its loss: distiller(model(batch), batch)")
        return activation

    def _recorder(self, side: int) -> Any:
        """Return a hook that records outputs of the student (0) or the teacher (1)."""

        def record(module: nn.Module, args: tuple, out: Any) -> None:
            self._activations[side][id(module)] = first_tensor(out)

        return record

    @torch.no_grad()
    def _teacher_outputs(self, batch: Any) -> dict[str, Tensor]:
        """Return the teacher's outputs for a batch, from the cache where it has them."""
        if self._cache is None:
            outputs = self._run_teacher(batch)
        else:
            device = tensors_in(batch)[0].device
            outputs = {k: v.to(device) for k, v in self._cache.outputs(batch, self._run_teacher).items()}
        if ANSWERS in outputs:
            outputs["logits"] = torch.cat(outputs.pop(ANSWERS).unbind(1))
        return outputs

    def _run_teacher(self, batch: Any) -> dict[str, Tensor]:
        """Return the teacher's logits, hidden states and projections for a batch."""
        teacher = self._models[1]
        if hasattr(batch, "keys") and "labels" in batch:
            batch = {k: batch[k] for k in batch if k != "labels"}
        with evaluating(teacher), torch.no_grad():
            out = call(teacher, batch)
        outputs = {"logits": _logits(out).detach()} if self.config.logits else {}
        if hasattr(out, "start_logits") and outputs:  # a row for each sample, as the cache stores them
            outputs = {ANSWERS: torch.stack(outputs["logits"].chunk(2), 1)}
        if self.config.pools:
            outputs["pooled"] = _embeddings(out, batch, self.config.pooling).detach()
        activations = self._activations[1]
        outputs.update({f"hidden.{i}": activations[id(p[1])].detach() for i, p in enumerate(self._pairs)})
        outputs.update({f"related.{i}": activations[id(p[1])].detach() for i, p in enumerate(self._projections)})
        activations.clear()
        return outputs


def _projector(inputs: int, outputs: int, seed: int) -> nn.Linear:
    """Return a linear map with the same initial weights in every run."""
    projector = nn.Linear(inputs, outputs, bias=False)
    noise = torch.rand(projector.weight.shape, generator=torch.Generator().manual_seed(seed))
    projector.weight.data.copy_((2 * noise - 1) / math.sqrt(inputs))
    return projector


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy to learn from, in evaluation mode: masks and grids are folded into its weights."""
    twin = fold_(copy.deepcopy(model)).eval()
    for p in twin.parameters():
        p.requires_grad_(False)
    return twin


def _hidden_pairs(student: nn.Module, teacher: nn.Module, config: Distill) -> list[tuple[nn.Module, nn.Module]]:
    """Return the (student, teacher) modules whose outputs are compared."""
    students = _hidden_modules(student, config.at)
    teachers = _hidden_modules(teacher, config.teacher_at if config.teacher_at is not None else config.at)
    if len(students) > len(teachers):
        raise ModelError(
            f"the student has {len(students)} hidden states, more than the teacher's {len(teachers)}: name those to "
            "compare with at and teacher_at"
        )
    return [(m, teachers[j]) for m, j in zip(students, DEPTHS[config.depth](len(students), len(teachers)))]


def _hidden_modules(model: nn.Module, patterns: Words) -> list[nn.Module]:
    """Return the modules that the globs name, by default the blocks. Raises SelectorError where none matches."""
    if patterns is None:
        try:
            return [b.module for b in find_blocks(model, all_layers(model))]
        except ModelError:
            raise ModelError(
                f"{type(model).__name__} has no list of equal blocks: name modules with at, such as at='layer*'"
            ) from None
    globs = [patterns] if isinstance(patterns, str) else list(patterns)
    modules = [m for n, m in model.named_modules() if any(fnmatchcase(n, g) for g in globs)]
    if not modules:
        raise SelectorError(f"at: {', '.join(globs)} matches no module of {type(model).__name__}")
    return modules


def _projection_pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return the (student, teacher) projections of queries, keys and values of the last block."""
    sides = []
    for model in (student, teacher):
        projections = {}
        for name, module in model.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in PROJECTIONS and isinstance(module, nn.Linear):
                projections[leaf[0]] = module  # queries, keys, values: the last of each
        if len(projections) != 3:
            raise ModelError(
                f"relations need a model's projections of queries, keys and values ({', '.join(PROJECTIONS)}): "
                f"{type(model).__name__} has {', '.join(projections) or 'none'}"
            )
        sides.append([projections[role] for role in "qkv"])
    return list(zip(*sides))


def _logits(out: Any) -> Tensor:
    """Return the logits of an output; of a model that finds answers those of starts, then of ends, [2 batch, tokens].

    Raises ModelError for a model without a head.
    """
    if hasattr(out, "start_logits"):
        return torch.cat([out.start_logits, out.end_logits])
    logits = getattr(out, "logits", None)
    if logits is None and hasattr(out, "last_hidden_state"):
        raise ModelError("the model returns hidden states, no logits: use logits=0 and hidden='squarehead'")
    return first_tensor(out) if logits is None else logits


def _embeddings(out: Any, batch: Any, pooling: str) -> Tensor:
    """Return the pooled hidden states of an output, [batch, features]. Raises ModelError where there are none."""
    hidden = getattr(out, "last_hidden_state", None)
    hidden = first_tensor(out) if hidden is None else hidden
    if hidden.dim() not in (2, 3):
        raise ModelError(
            f"embedding and similarity pool hidden states [batch, tokens, features], but the model returns "
            f"{describe_batch(hidden)}: leave them out"
        )
    mask = batch.get("attention_mask") if hasattr(batch, "keys") else None
    fits = mask is not None and mask.shape == hidden.shape[:2]
    return hidden.float() if hidden.dim() == 2 else pool(hidden, mask if fits else None, pooling)


def _rows(x: Tensor, mask: Tensor | None, labels: Tensor | None = None) -> Tensor:
    """Return real tokens of [..., features] as rows, [n, features]; of images [B, C, H, W] the pixels, [n, C]."""
    if x.dim() >= 4:
        return x.flatten(2).transpose(1, 2).flatten(0, 1)
    masks = [t for t in (mask, None if labels is None else labels != -100) if t is not None and t.shape == x.shape[:2]]
    if x.dim() == 3 and masks:
        return x[torch.stack([t.bool() for t in masks]).all(0)]
    return x.flatten(0, -2) if x.dim() > 2 else x


def _causal(model: nn.Module) -> bool:
    """Return whether a language model predicts the next token."""
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate and can_generate())


def _check_same_shape(s: Tensor, t: Tensor, student: nn.Module, teacher: nn.Module) -> None:
    """Raise ModelError where outputs of student and teacher have different shapes."""
    if s.shape != t.shape:
        raise ModelError(
            f"outputs do not match: the student ({type(student).__name__}) gives {describe_batch(s)}, the teacher "
            f"({type(teacher).__name__}) {describe_batch(t)}"
        )
