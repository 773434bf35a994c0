"""The normalisers from their definitions: float64, plain loops, nothing shared with the package.

Written with torch's scalar arithmetic, so that autograd gives every gradient by definition too.
``constant`` marks what a definition holds fixed under differentiation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> list[Tensor]:
    """Detached float64 copies that ask for a gradient."""
    return [t.detach().double().requires_grad_() for t in tensors]


def constant(tensor: Tensor) -> Tensor:
    return tensor.detach()


def channel(x: Tensor, c: int) -> Tensor:
    """All elements of one channel of a batch, in a row."""
    return torch.cat([x[n, c].reshape(-1) for n in range(x.shape[0])])


def mean(values: Tensor) -> Tensor:
    total = torch.zeros((), dtype=values.dtype)
    for chunk in values.split(64):
        total = total + chunk.sum()
    return total / values.numel()


def affine(x: Tensor, c: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight[c]
    return x if bias is None else x + bias[c]


def filter_response_norm(x, weight, bias, tau, eps_l, eps):
    samples = []
    for n in range(x.shape[0]):
        rows = []
        for c in range(x.shape[1]):
            row = x[n, c]
            mean_square = mean(row.reshape(-1) ** 2)
            epsilon = abs(eps) if eps_l is None else abs(eps) + abs(eps_l[c])
            y = affine(row / torch.sqrt(mean_square + epsilon), c, weight, bias)
            rows.append(y if tau is None else torch.maximum(y, tau[c]))
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def evo_norm(x, weight, bias, v, groups, eps):
    size = x.shape[1] // groups
    samples = []
    for n in range(x.shape[0]):
        rows = []
        for c in range(x.shape[1]):
            first = c // size * size
            group = torch.cat([x[n, i].reshape(-1) for i in range(first, first + size)])
            std = torch.sqrt(mean((group - mean(group)) ** 2) + eps)
            rows.append(affine(x[n, c] / (1 + torch.exp(-v[c] * x[n, c])) / std, c, weight, bias))
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def batch_norm(x, weight, bias, eps):
    means = [mean(channel(x, c)) for c in range(x.shape[1])]
    variances = [mean((channel(x, c) - means[c]) ** 2) for c in range(x.shape[1])]
    return normalise(x, means, variances, weight, bias, eps)


def ghost_batch_norm(x, weight, bias, eps, sizes):
    parts, first = [], 0
    for size in sizes:
        parts.append(batch_norm(x[first : first + size], weight, bias, eps))
        first += size
    return torch.cat(parts)


def normalise(x, means, variances, weight, bias, eps):
    samples = []
    for n in range(x.shape[0]):
        rows = [
            affine((x[n, c] - means[c]) / torch.sqrt(variances[c] + eps), c, weight, bias)
            for c in range(x.shape[1])
        ]
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def batch_renorm(x, weight, bias, running_mean, running_var, eps, momentum, r_max, d_max):
    """Output and the new running mean and variance."""
    columns, new_means, new_variances = [], [], []
    for c in range(x.shape[1]):
        values = channel(x, c)
        mu = mean(values)
        sigma = torch.sqrt(mean((values - mu) ** 2) + eps)
        running_sigma = torch.sqrt(running_var[c] + eps)
        r = constant(torch.clamp(sigma / running_sigma, 1 / r_max, r_max))
        d = constant(torch.clamp((mu - running_mean[c]) / running_sigma, -d_max, d_max))
        columns.append(affine((x[:, c] - mu) / sigma * r + d, c, weight, bias))
        new_means.append(running_mean[c] + momentum * (constant(mu) - running_mean[c]))
        new_sigma = running_sigma + momentum * (constant(sigma) - running_sigma)
        new_variances.append(new_sigma**2 - eps)
    return torch.stack(columns, 1), torch.stack(new_means), torch.stack(new_variances)


class CrossIteration:
    """CBN as the paper writes it: second moments, Taylor terms by autograd, Python lists.

    Args:
        linear_map: (input, weight) to the producer's output without its bias, channels on axis 1.
    """

    def __init__(self, linear_map, window, eps, rule="max", compensate=True):
        self.linear_map, self.window, self.eps = linear_map, window, eps
        self.rule, self.compensate = rule, compensate
        self.history = []

    def step(self, source, weight, bias):
        """The normalised output of one iteration, differentiable in ``source``, weight and bias."""
        y = self.linear_map(source, weight)
        shift = torch.zeros(y.shape[1], dtype=y.dtype) if bias is None else bias
        channels = range(y.shape[1])
        mu = [mean(channel(y, c)) for c in channels]
        nu = [mean(channel(y, c) ** 2) for c in channels]
        mu_bar, var_bar = [], []
        for c in channels:
            mus, nus = [mu[c] + shift[c]], [nu[c] + 2 * shift[c] * mu[c] + shift[c] ** 2]
            for past in self.history:
                mu_hat, nu_hat = self.predict(past, c, constant(weight))
                if self.rule == "drop" and nu_hat < mu_hat**2:
                    continue
                nu_hat = max(nu_hat, mu_hat**2)
                b = constant(shift[c])
                if not self.compensate:
                    b = past["bias"][c]
                mus.append(mu_hat + b)
                nus.append(nu_hat + 2 * b * mu_hat + b**2)
            mu_bar.append(sum(mus) / len(mus))
            var_bar.append(sum(nus) / len(nus) - mu_bar[-1] ** 2)
        self.push(mu, nu, weight, shift)
        biased = y + shift.reshape(1, -1, *([1] * (y.dim() - 2)))
        return normalise(biased, mu_bar, var_bar, None, None, self.eps)

    def predict(self, past, c, weight):
        mu_hat, nu_hat = past["mu"][c], past["nu"][c]
        if self.compensate:
            moved = weight - past["weight"]
            mu_hat = mu_hat + (past["dmu"][c] * moved).sum()
            nu_hat = nu_hat + (past["dnu"][c] * moved).sum()
        return mu_hat, nu_hat

    def push(self, mu, nu, weight, shift):
        if self.window == 1:
            return
        self.history.append(
            {
                "mu": [constant(m) for m in mu],
                "nu": [constant(n) for n in nu],
                "dmu": [torch.autograd.grad(m, weight, retain_graph=True)[0] for m in mu],
                "dnu": [torch.autograd.grad(n, weight, retain_graph=True)[0] for n in nu],
                "weight": constant(weight).clone(),
                "bias": constant(shift).clone(),
            }
        )
        self.history = self.history[-(self.window - 1) :]
