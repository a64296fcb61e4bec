"""Rarefy makes trained PyTorch models smaller and faster, and proves it.

receipt = rarefy.compress_(model, "recipe.yaml", data=batches)
rarefy.save(model, "out/")
model = rarefy.load("out/")
"""

from rarefy.checkpoint.export import export
from rarefy.checkpoint.inspect import inspect
from rarefy.checkpoint.load import load
from rarefy.checkpoint.save import save
from rarefy.common.errors import RarefyError
from rarefy.common.report import Report
from rarefy.common.version import __version__ as __version__
from rarefy.compiler.compile import compile
from rarefy.dependency.graph import groups
from rarefy.evaluation.receipt import Receipt
from rarefy.generation.decoder import decoder
from rarefy.generation.sampling import generate, stream
from rarefy.lowrank.layer_tying import tie_layers_
from rarefy.lowrank.svd import factorize_
from rarefy.migration.migrate import Migrated, migrate
from rarefy.model.masks import adopt_, fold_, masks
from rarefy.onnx.export import export_onnx
from rarefy.onnx.load import from_onnx
from rarefy.pipeline.compress import cast_, compress_
from rarefy.pipeline.train_stage import Sparsifier
from rarefy.prune.prune import prune_
from rarefy.prune.solver_config import Solver
from rarefy.quantization.codebook import share_
from rarefy.quantization.quantize import quantize_
from rarefy.recipe.parser import Recipe
from rarefy.runtime.autotune import accelerate_
from rarefy.structured.cut import cut_
from rarefy.structured.head_pruning import prune_heads_
from rarefy.structured.layer_drop import drop_layers_
from rarefy.structured.permutation import permute_
from rarefy.train.distill import Distill, Distiller
from rarefy.train.fit import fit_
from rarefy.train.sparsity_config import Admm, Alternate, Gradual, Movement, Rewind, Rigl, SecondOrder

__all__ = [
    "Admm",
    "Alternate",
    "Distill",
    "Distiller",
    "Gradual",
    "Migrated",
    "Movement",
    "RarefyError",
    "Receipt",
    "Recipe",
    "Report",
    "Rewind",
    "Rigl",
    "SecondOrder",
    "Solver",
    "Sparsifier",
    "accelerate_",
    "adopt_",
    "cast_",
    "compile",
    "compress_",
    "cut_",
    "decoder",
    "drop_layers_",
    "export",
    "export_onnx",
    "factorize_",
    "fit_",
    "fold_",
    "from_onnx",
    "generate",
    "groups",
    "inspect",
    "load",
    "masks",
    "migrate",
    "permute_",
    "prune_",
    "prune_heads_",
    "quantize_",
    "save",
    "share_",
    "stream",
    "tie_layers_",
]
