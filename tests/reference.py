"""The published formulas of Sadam and SAMSGrad in float64, written from the paper and independent of update.py."""

from __future__ import annotations

import numpy as np


def softplus(x: np.ndarray, beta: float) -> np.ndarray:
    """log(1 + exp(beta x)) / beta; numpy's logaddexp keeps it from overflowing."""
    return np.logaddexp(0.0, beta * x) / beta


class Reference:
    """Adam's recursion with the softplus denominator, one call of ``step`` a gradient."""

    def __init__(
        self,
        theta,
        *,
        lr,
        betas,
        beta,
        weight_decay=0.0,
        decoupled=False,
        amsgrad=False,
        bias_correction="inner",
        maximize=False,
    ):
        self.theta = np.array(theta, dtype=np.float64)
        self.m, self.v, self.largest_v = (np.zeros_like(self.theta) for _ in range(3))
        self.t = 0
        self.lr, (self.b1, self.b2), self.beta = lr, betas, beta
        self.weight_decay, self.decoupled, self.amsgrad = weight_decay, decoupled, amsgrad
        self.bias_correction, self.maximize = bias_correction, maximize

    def step(self, gradient) -> np.ndarray:
        g = np.array(gradient, dtype=np.float64)
        self.t += 1
        if self.maximize:
            g = -g
        if self.decoupled:
            self.theta = self.theta * (1 - self.lr * self.weight_decay)
        else:
            g = g + self.weight_decay * self.theta
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        self.largest_v = np.maximum(self.largest_v, self.v)
        s = np.sqrt(self.largest_v if self.amsgrad else self.v)
        c1, c2 = 1 - self.b1**self.t, 1 - self.b2**self.t
        if self.bias_correction == "outer":
            self.theta = self.theta - self.lr * np.sqrt(c2) / c1 * self.m / softplus(s, self.beta)
        elif self.bias_correction == "inner":
            self.theta = self.theta - self.lr / c1 * self.m / softplus(s / np.sqrt(c2), self.beta)
        else:
            self.theta = self.theta - self.lr * self.m / softplus(s, self.beta)
        return self.theta
