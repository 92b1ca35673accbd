"""How much of what is left to learn do adapters learn? A world whose true click probabilities are known tells.

    python examples/known_world.py            # 400,000 rows, about ten minutes on one core
    python examples/known_world.py --quick    # under a minute: few rows, and a base cut short, which flatters the adapters

The full experiment, five worlds with intervals, is ``domlora study studies/synthetic.toml``.
"""

from __future__ import annotations

import copy
import sys

import domlora
from domlora import AdapterOptions, Recipe, World
from domlora.evaluation.metrics import wauc
from domlora.training.fit import FitOptions
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.stages import Stage

QUICK = "--quick" in sys.argv
NUM_ROWS, MAX_EPOCHS = (60_000, 8) if QUICK else (400_000, 100)

data, truth = World(num_domains=10, seed=1).dataset(NUM_ROWS, seed=1)

# Labels are noisy, so everything is held back: weight decay, a little dropout, an average of the weights. An adapter
# sees only its own domain's share of the rows and may move faster.
shared = Rule("adamw", lr=1e-3, weight_decay=3.0)
adapters = Rule("adamw", lr=3e-3, weight_decay=1.0)
stage = Stage(
    FitOptions(batch_size=4096 if not QUICK else 1024, max_epochs=MAX_EPOCHS, patience=4, average_decay=0.995),
    OptimizerOptions(tables=shared, dense=shared, adapters=adapters),
)
recipe = Recipe(adapter=AdapterOptions(temperature=16), pretrain=stage, joint=stage, adapt=stage)
mlp = {"name": "mlp", "hidden_units": [256, 128, 64], "dropout": 0.1}

models = {}
models["base"], _ = domlora.pretrain(data, mlp, recipe)
models["joint"], _ = domlora.pretrain(data, mlp, recipe, method="joint")
models["two_stage"] = copy.deepcopy(models["base"])
domlora.adapt(models["two_stage"], data, recipe)

rows = data.read("test")
best = wauc(rows.label.numpy(), truth.numpy(), rows.domain.numpy())
scores = {}
for name, model in models.items():
    said = domlora.predict(model, data.batches("test", 16384))
    scores[name] = domlora.by_domain(said, data.schema.domains).wauc

print(f"{'truth':<10} {100 * best:6.2f}")
for name, score in scores.items():
    closed = (score - scores["base"]) / (best - scores["base"])
    print(f"{name:<10} {100 * score:6.2f}   closes {100 * closed:3.0f} % of the gap between base and truth")
