"""How features meet: products, crosses, attention. Every learned map is an ``nn.Linear`` that is called.

``x`` is ``(B, F, E)``: one vector of ``E`` numbers for each of ``F`` categorical features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "CIN",
    "BilinearInteraction",
    "BilinearKind",
    "CrossNet",
    "InteractingLayer",
    "SENet",
    "bi_interaction",
    "factorization_machine",
    "inner_products",
]

BilinearKind = Literal["all", "each", "interaction"]

_FEW = 4
"""Up to this many features, products written out pair by pair are faster on a CPU than thousands of tiny matmuls."""


def bi_interaction(x: Tensor) -> Tensor:
    """Sum over all pairs of features of the elementwise product.

    ``y = sum_{i<j} x_i ⊙ x_j = ((sum_i x_i)² - sum_i x_i²) / 2``.

    **Shape**: ``(B, F, E)`` to ``(B, E)``.

    Source: He and Chua 2017, "Neural Factorization Machines", eq. 3-4.

    Example:
        >>> bi_interaction(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[3., 8.]])
    """
    return 0.5 * (x.sum(1).square() - x.square().sum(1))


def factorization_machine(x: Tensor) -> Tensor:
    """The second-order term of a factorization machine: ``y = sum_{i<j} x_i · x_j``.

    **Shape**: ``(B, F, E)`` to ``(B, 1)``.

    Source: Rendle 2010, "Factorization Machines", eq. 1 and lemma 3.1.

    Example:
        >>> factorization_machine(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[11.]])
    """
    return bi_interaction(x).sum(-1, keepdim=True)


def inner_products(x: Tensor) -> Tensor:
    """The inner product of each pair of features, in the order (0, 1), (0, 2), ..., (F-2, F-1).

    **Shape**: ``(B, F, E)`` to ``(B, F (F-1) / 2)``.

    Source: Qu et al. 2016, "Product-based Neural Networks", section III.B (IPNN), each product on its own as in DeepCTR;
    the paper factorises a weighted sum of them.

    Example:
        >>> inner_products(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]]]))
        tensor([[11.,  2.,  4.]])
    """
    pairs = list(combinations(range(x.shape[1]), 2))
    if x.shape[1] <= _FEW:
        features = x.unbind(1)
        return torch.stack([(features[i] * features[j]).sum(-1) for i, j in pairs], dim=1)
    products = torch.bmm(x, x.transpose(1, 2)).flatten(1)  # (B, F, F) -> (B, F * F)
    return products[:, [i * x.shape[1] + j for i, j in pairs]]


class CrossNet(nn.Module):
    """Cross layers of the vector kind: bounded-degree feature crosses at a linear cost.

    ``x_{l+1} = x_0 (w_l · x_l) + b_l + x_l``. ``w`` starts glorot normal, ``b`` at zero.

    **Shape**: ``(B, width)`` to ``(B, width)``.

    Args:
        width: columns of the input.
        num_layers: degree of the crosses less one.

    Source: Wang et al. 2017, "Deep & Cross Network for Ad Click Predictions", eq. 3. FuxiCTR's and DeepCTR-Torch's
    ``CrossNet`` (vector) agree.
    """

    def __init__(self, width: int, num_layers: int = 2) -> None:
        super().__init__()
        kernels = [nn.Linear(width, 1, bias=False) for _ in range(num_layers)]
        for kernel in kernels:
            nn.init.xavier_normal_(kernel.weight)
        self.kernels = nn.ModuleList(kernels)
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        crossed = x
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            crossed = x * kernel(crossed) + (crossed + bias)  # (B, width) * (B, 1)
        return crossed


class CIN(nn.Module):
    """Compressed interaction network: vector-wise crosses of ever higher degree, summed over the embedding axis.

    ``x^k[h] = relu(b^k[h] + sum_{m,i} W^k[h, m, i] x^0[m] ⊙ x^{k-1}[i])``, ``y = sum_E x^k``: a Linear over the
    channels of the outer product, the same at each of the ``E`` positions. With ``split_half`` the first half of a
    layer's maps feeds the next layer and the second half goes to the output; the last layer gives all its maps. Weights
    start glorot uniform, biases at zero.

    **Shape**: ``(B, F, E)`` to ``(B, out_features)``, ``out_features = sum(units[:-1]) / 2 + units[-1]`` with
    ``split_half``, else ``sum(units)``.

    Args:
        num_features: ``F``.
        units: feature maps of each layer. The costly part of an xDeepFM: ``B E F units[0] units[1]`` multiplications.
        split_half: see above; layers but the last must then be even.

    Source: Lian et al. 2018, "xDeepFM", eq. 6, with DeepCTR's relu, bias and ``split_half`` (the paper: identity, no
    split). DeepCTR-Torch's ``CIN`` orders a layer's inputs (i, m), this one and FuxiCTR's (m, i). FuxiCTR's
    ``CompressedInteractionNet`` has neither relu nor split. Both call ``Conv1d``, which no adapter of Linears reaches.
    """

    def __init__(self, num_features: int, units: Sequence[int] = (128, 128), split_half: bool = True) -> None:
        super().__init__()
        self.kept = [size // 2 for size in units[:-1]] if split_half else list(units[:-1])
        inputs = [num_features, *self.kept]
        layers = [nn.Linear(num_features * before, size) for before, size in zip(inputs, units, strict=True)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)
        self.split_half = split_half
        self.out_features = sum(units) - (sum(self.kept) if split_half else 0)

    def forward(self, x: Tensor) -> Tensor:
        first = x.transpose(1, 2).contiguous()  # (B, E, F): channels last, as a Linear reads them
        hidden, outputs = first, []
        for i, layer in enumerate(self.layers):
            # a matmul, because its gradient is two more, where that of a product is two sums over (B, E, F, H)
            outer = torch.matmul(first.unsqueeze(-1), hidden.unsqueeze(-2)).flatten(2)  # (B, E, F, H) -> (B, E, F * H)
            hidden = direct = torch.relu(layer(outer))  # (B, E, units)
            if self.split_half and i < len(self.kept):
                hidden, direct = hidden.tensor_split([self.kept[i]], dim=-1)
            outputs.append(direct.sum(1))
        return torch.cat(outputs, dim=1)


class InteractingLayer(nn.Module):
    """Multi-head self-attention over the features of a row, with a residual map.

    ``y_f = relu([head_1, ..., head_H]_f + W_res x_f)``, ``head_f = sum_k softmax_k(q_f · k_k) v_k``. Weights start from
    a normal of 0.05, truncated at two standard deviations.

    **Shape**: ``(B, F, in_features)`` to ``(B, F, num_heads * head_dim)``.

    Args:
        in_features: width of a feature's vector.
        num_heads: attention heads.
        head_dim: width of a head.
        scaling: divide the scores by ``sqrt(head_dim)``; the paper does not.

    Source: Song et al. 2019, "AutoInt", eq. 5-8. DeepCTR-Torch's layer takes ``head_dim = in_features / num_heads``;
    FuxiCTR's leaves the residual as it is where the widths agree (this one, the paper and DeepCTR always map it).
    ``nn.MultiheadAttention`` keeps raw parameters that no adapter of Linears reaches.
    """

    heads: Tensor

    def __init__(self, in_features: int, num_heads: int = 4, head_dim: int = 8, scaling: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.scale = head_dim**-0.5 if scaling else 1.0
        self.out_features = num_heads * head_dim
        self.query = nn.Linear(in_features, self.out_features, bias=False)
        self.key = nn.Linear(in_features, self.out_features, bias=False)
        self.value = nn.Linear(in_features, self.out_features, bias=False)
        self.residual = nn.Linear(in_features, self.out_features, bias=False)
        for linear in (self.query, self.key, self.value, self.residual):
            nn.init.trunc_normal_(linear.weight, std=0.05, a=-0.1, b=0.1)
        # (H * d, H): which head a column belongs to; constant
        self.register_buffer("heads", torch.eye(num_heads).repeat_interleave(head_dim, dim=0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x) * self.scale if self.scale != 1.0 else self.query(x)
        attend = self._attend_few if x.shape[1] <= _FEW else self._attend
        return torch.relu(attend(query, self.key(x), self.value(x)) + self.residual(x))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape = (*query.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (y.view(shape).transpose(1, 2) for y in (query, key, value))  # (B, H, F, d)
        mixed: Tensor = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return mixed.transpose(1, 2).flatten(2)  # (B, F, H * d)

    def _attend_few(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same numbers, feature by feature."""
        keys, values, mixed = key.unbind(1), value.unbind(1), []
        for q in query.unbind(1):  # (B, H * d)
            scores = torch.stack([(q * k) @ self.heads for k in keys])  # (F, B, H)
            weights = scores.softmax(0).unbind(0)
            mixed.append(reduce(torch.add, [(w @ self.heads.t()) * v for w, v in zip(weights, values, strict=True)]))
        return torch.stack(mixed, dim=1)


class SENet(nn.Module):
    """Squeeze and excitation: weigh the features of a row by their importance in it.

    ``y_f = a_f x_f``, ``a = relu(W_2 relu(W_1 mean_E(x)))``. Weights start glorot normal. Three features
    with ``reduction=3`` leave a bottleneck of one unit; then a feature whose weight in ``W_2`` starts below zero, one in
    two, has ``y_f = 0`` and no gradient for good. The structure is the paper's.

    **Shape**: ``(B, F, E)`` to ``(B, F, E)``.

    Args:
        num_features: ``F``.
        reduction: the bottleneck has ``max(F // reduction, 1)`` units.

    Source: Huang et al. 2019, "FiBiNET", the SENET layer. FuxiCTR's and DeepCTR-Torch's layers agree.
    """

    def __init__(self, num_features: int, reduction: int = 3) -> None:
        super().__init__()
        bottleneck = max(num_features // reduction, 1)
        self.squeeze = nn.Linear(num_features, bottleneck, bias=False)
        self.excite = nn.Linear(bottleneck, num_features, bias=False)
        for linear in (self.squeeze, self.excite):
            nn.init.xavier_normal_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        importance = torch.relu(self.excite(torch.relu(self.squeeze(x.mean(-1)))))  # (B, F)
        return x * importance.unsqueeze(-1)


class BilinearInteraction(nn.Module):
    """A learned product of each pair of features: ``y_ij = (W x_i) ⊙ x_j`` for ``i < j``.

    ``W`` is one matrix for all pairs (``all``), one for each left feature (``each``) or one for each pair
    (``interaction``). The matrices of the pairs (i, i+1), ..., (i, F-1) lie under one another in one Linear, so that a
    feature costs one matmul and not F. Each matrix starts glorot normal.

    **Shape**: ``(B, F, E)`` to ``(B, F (F-1) / 2, E)``, pairs in the order (0, 1), (0, 2), ..., (F-2, F-1).

    Args:
        num_features: ``F``.
        embedding_dim: ``E``.
        kind: see above.

    Source: Huang et al. 2019, "FiBiNET", the bilinear-interaction layer, as DeepCTR. DeepCTR-Torch and FuxiCTR
    also keep a matrix for the last feature of ``each``, which never stands on the left and so never learns; FuxiCTR's
    matrices are transposed (``x W``).
    """

    def __init__(self, num_features: int, embedding_dim: int, kind: BilinearKind = "interaction") -> None:
        super().__init__()
        rights = range(num_features - 1, 0, -1)  # how many features stand to the right of feature 0, 1, ...
        blocks = {"all": [1], "each": [1 for _ in rights], "interaction": list(rights)}[kind]
        self.embedding_dim = embedding_dim
        self.shared = kind == "all"
        layers = [nn.Linear(embedding_dim, size * embedding_dim, bias=False) for size in blocks]
        for layer in layers:
            for matrix in torch.split(layer.weight, embedding_dim):
                nn.init.xavier_normal_(matrix)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        last = x.shape[1] - 1
        # (B, E) -> (B, 1 or F - 1 - i, E) for each left feature i
        lefts = (
            [column for layer in self.layers for column in torch.split(layer(x[:, :last]), 1, dim=1)]
            if self.shared
            else [layer(x[:, i]).unflatten(-1, (-1, self.embedding_dim)) for i, layer in enumerate(self.layers)]
        )
        return torch.cat([left * x[:, i + 1 :] for i, left in enumerate(lefts)], dim=1)
