"""A DeepCTR-Torch script as its user wrote it: one DeepFM for ten domains, the domain as one more feature.

pip install deepctr-torch requests
"""

import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat
from deepctr_torch.models import DeepFM
from sklearn.metrics import roc_auc_score

from domlora import World

# Rows of ten domains that differ, and the chance of a click in each, which no model can beat.
rows, chance = World(num_domains=10, difference=1.0, sharpness=3.0, seed=1).sample(32_000, seed=1)
domain, label, dense = rows.domain.numpy(), rows.label.numpy(), rows.dense.numpy()
columns = {"domain": domain, **{f"x{number}": dense[:, number] for number in range(16)}}
train = {name: column[:24_000] for name, column in columns.items()}
test = {name: column[24_000:] for name, column in columns.items()}

features = [SparseFeat("domain", 10, 8), *(DenseFeat(f"x{number}") for number in range(16))]
model = DeepFM(features, features, dnn_hidden_units=(128, 64), init_std=0.1)

model.compile(torch.optim.Adam(model.parameters(), lr=3e-3), "binary_crossentropy", metrics=["auc"])
model.fit(dict(train), label[:24_000], batch_size=512, epochs=8, verbose=0)


def auc_of_domains(score):
    """The mean of each domain's own AUC."""
    parts = [test["domain"] == number for number in range(10)]
    return sum(roc_auc_score(label[24_000:][part], score[part]) for part in parts) / len(parts)


said = model.predict(dict(test)).ravel()
print(f"AUC, mean over domains: {auc_of_domains(said):.4f}")
print(f"of the truth:           {auc_of_domains(chance[24_000:].numpy()):.4f}")
