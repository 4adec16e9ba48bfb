"""ReLoRA pretraining in NumPy float64: a reference for implementations.

Written from the method's definition (arXiv 2307.05695) alone: a LLaMA decoder with a hand-written backward
pass, AdamW, the jagged schedule, merges and resets. It aims to be obviously right, not fast, and shares no
code with what it checks. All randomness comes from the caller, so that two runs can use the same draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, isfinite, pi, prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Ints = NDArray[np.integer[Any]]
Params = dict[str, Array]
Draw = Callable[[int, str], Array]  # of the update and a kernel's name
DrawMask = Callable[[int, str], Mask]  # of the update and a factor's name
AdjustMask = Callable[[int, str, Mask, Array], Mask]  # also of the magnitude mask and the first moment

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attention_norm", "mlp_norm", "norm", "q_norm", "k_norm")  # the leaves without weight decay


@dataclass(frozen=True)
class Model:
    """A LLaMA decoder: RMSNorm, RoPE on split halves, SwiGLU, grouped-query attention.

    A kernel with a "<name>.bias" among the parameters adds it; with "q_norm" and "k_norm" every head of q and
    of k is normalized before its rotation.
    """

    vocab: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 1e4
    rms_eps: float = 1e-6
    tied: bool = False
    scaling: tuple[str, tuple[float, ...]] = ("none", ())  # of the positions: kind and parameters


@dataclass(frozen=True)
class Settings:
    """One run: its length, its arm, the low-rank phase, the optimizer."""

    updates: int  # N
    warm_start: int  # W, 0..N; ignored by the arm "full"
    arm: str  # "full" | "relora" | "lora" (factors never merged, no dips)
    rank: int
    alpha: float
    targets: tuple[str, ...]  # among q k v o gate up down
    cycle: int  # R
    merges_per_cycle: int
    restart_warm_up: int
    warm_up: int  # of the low-rank phase
    jagged: bool  # False: C(s) without dips
    peak_lr: float  # of the low-rank phase
    factor_lr_ratio: float
    prune: str  # "zero" | "magnitude" | "random" | "none"
    fraction: float  # f of "magnitude" and "random"
    reset_count: bool
    base_init: str  # "keep" | "zero"
    trains_a: bool  # False (RSO): A is drawn at the start and at each merge, and otherwise constant
    full_peak_lr: float  # of the full-rank phase
    full_warm_up: int
    kernel_lr_ratio: float  # of the blocks' kernels that are trained in full rank
    min_lr_ratio: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float  # 0: no clipping

    def __post_init__(self) -> None:
        """Rejects settings that the method does not define."""
        assert self.arm in ("full", "relora", "lora"), self.arm
        assert self.prune in ("zero", "magnitude", "random", "none"), self.prune
        assert self.base_init in ("keep", "zero"), self.base_init
        assert self.arm == "full" or 0 <= self.warm_start <= self.updates, "W lies in 0..N"
        if self.arm == "relora":
            assert self.cycle % self.merges_per_cycle == 0, "merges_per_cycle divides the cycle"
            assert not self.reset_count or self.prune == "zero", "reset_count needs prune zero"
        if self.arm != "full":
            assert self.base_init == "keep" or self.warm_start == 0, "zero base kernels: W = 0 only"

    @property
    def scale(self) -> float:
        """alpha / rank, the factor of A @ B."""
        return self.alpha / self.rank if self.rank else 0.0


def multiplier(
    s: int, *, total: int, warm_up: int, cycle: int, restart_warm_up: int, min_lr_ratio: float, dips: bool
) -> float:
    """The learning rate's multiplier at update s of a phase of `total` updates.

    C(s) = m + (1 - m) (1 + cos(pi (s - w0) / (T - w0))) / 2; s < w0: s / w0; else, with n = s div R and
    k = s mod R, if dips and k < wr and s >= R: (k / wr) C(nR + wr); else C(s).
    """

    def curve(at: int) -> float:
        return min_lr_ratio + (1 - min_lr_ratio) * (1 + cos(pi * (at - warm_up) / (total - warm_up))) / 2

    if s < warm_up:
        return s / warm_up
    if dips and s >= cycle:
        n, k = divmod(s, cycle)
        if k < restart_warm_up:
            return k / restart_warm_up * curve(n * cycle + restart_warm_up)
    return curve(s)


def rate(u: int, settings: Settings) -> float:
    """The learning rate of update u; factors take `factor_lr_ratio` times it.

    Full-rank (u < W, or the arm "full"): the plain cosine over all N updates. Low-rank: the phase's own
    peak and warm-up over T = N - W updates at s = u - W; dips for the arm "relora" only.
    """
    full = settings.arm == "full" or u < settings.warm_start
    start = 0 if full else settings.warm_start
    return (settings.full_peak_lr if full else settings.peak_lr) * multiplier(
        u - start,
        total=settings.updates - start,
        warm_up=settings.full_warm_up if full else settings.warm_up,
        cycle=settings.cycle,
        restart_warm_up=settings.restart_warm_up,
        min_lr_ratio=settings.min_lr_ratio,
        dips=not full and settings.arm == "relora" and settings.jagged,
    )


def _linear(params: Params, name: str, i: int, x: Array, scale: float) -> Array:
    """y = x W + scale (x A) B + bias; just x W where the kernel has no factors and no bias."""
    y: Array = x @ params[name][i]
    if f"{name}.bias" in params:
        y = y + params[f"{name}.bias"][i]
    if f"{name}.a" in params:
        y = y + scale * (x @ params[f"{name}.a"][i]) @ params[f"{name}.b"][i]
    return y


def _linear_back(
    params: Params, grads: Params, name: str, i: int, x: Array, dy: Array, scale: float
) -> Array:
    """dW = x^T dy, dA = scale x^T (dy B^T), dB = scale (x A)^T dy, dbias = sum of dy.

    Returns dx = dy W^T + scale dy B^T A^T.
    """
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    grads[name][i] += rows.T @ drows
    if f"{name}.bias" in params:
        grads[f"{name}.bias"][i] += drows.sum(0)
    dx: Array = dy @ params[name][i].T
    if f"{name}.a" in params:
        a, b = params[f"{name}.a"][i], params[f"{name}.b"][i]
        grads[f"{name}.a"][i] += scale * rows.T @ (drows @ b.T)
        grads[f"{name}.b"][i] += scale * (rows @ a).T @ drows
        dx = dx + scale * (dy @ b.T) @ a.T
    return dx


def _norm(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm: weight x / sqrt(mean(x^2) + eps)."""
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def _norm_back(x: Array, weight: Array, eps: float, dy: Array) -> tuple[Array, Array]:
    """With z = x / rms and g = weight dy: dx = (g - z mean(g z)) / rms, dweight = sum of dy z."""
    rms = np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    z, g = x / rms, weight * dy
    dx = (g - z * (g * z).mean(-1, keepdims=True)) / rms
    return dx, (dy * z).reshape(-1, x.shape[-1]).sum(0)


def _head_norm(model: Model, params: Params, name: str, i: int, x: Array) -> Array:
    """The norm of each head [B, H, S, hd] of q or k; x itself where the model has none."""
    return _norm(x, params[f"{name}_norm"][i], model.rms_eps) if f"{name}_norm" in params else x


def _head_norm_back(
    model: Model, params: Params, grads: Params, name: str, i: int, x: Array, dy: Array
) -> Array:
    """The backward pass of `_head_norm`: adds to `grads`, returns dx."""
    if f"{name}_norm" not in params:
        return dy
    dx, grads[f"{name}_norm"][i] = _norm_back(x, params[f"{name}_norm"][i], model.rms_eps, dy)
    return dx


def _turn(model: Model, i: int, length: int) -> float:
    """The angle in radians between neighboring positions for pair i, in a row of `length` ids."""
    kind, numbers = model.scaling
    dim = model.head_dim
    plain = model.rope_theta ** (-2.0 * i / dim)
    if kind == "linear":
        return plain / numbers[0]
    if kind == "dynamic":
        factor, trained = numbers
        grown = 1.0 if length <= trained else factor * length / trained - factor + 1
        return (model.rope_theta * grown ** (dim / (dim - 2))) ** (-2.0 * i / dim)
    if kind == "llama3":
        factor, low, high, trained = numbers
        wavelength = 2 * np.pi / plain
        if wavelength < trained / high:
            return plain
        if wavelength > trained / low:
            return plain / factor
        smooth = (trained / wavelength - low) / (high - low)
        return (1 - smooth) * plain / factor + smooth * plain
    assert kind == "none"
    return plain


def _rotate(x: Array, model: Model, sign: float = 1.0) -> Array:
    """RoPE on [B, H, S, hd]: (x1 cos - x2 sin, x2 cos + x1 sin); sign -1 is the inverse and adjoint."""
    length, dim = x.shape[-2:]
    angles = np.outer(np.arange(length), [_turn(model, i, length) for i in range(dim // 2)])
    c, s = np.cos(angles), sign * np.sin(angles)
    x1, x2 = x[..., : dim // 2], x[..., dim // 2 :]
    return np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1)


def _split(x: Array, heads: int) -> Array:
    """[B, S, H hd] -> [B, H, S, hd]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _join(x: Array) -> Array:
    """[B, H, S, hd] -> [B, S, H hd]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _run_forward(model: Model, params: Params, ids: Ints, scale: float) -> tuple[Array, list[Params], Array]:
    """The logits, every layer's intermediate values, and the last layer's output."""
    x = params["embed"][ids]
    length, group = ids.shape[1], model.heads // model.kv_heads
    causal = np.tril(np.ones((length, length), dtype=bool))
    saved: list[Params] = []
    for i in range(model.layers):
        h = _norm(x, params["attention_norm"][i], model.rms_eps)
        plain = {name: _linear(params, name, i, h, scale) for name in "qk"}
        heads = {"q": _split(plain["q"], model.heads), "k": _split(plain["k"], model.kv_heads)}
        q, k = (_rotate(_head_norm(model, params, name, i, heads[name]), model) for name in "qk")
        v = _split(_linear(params, "v", i, h, scale), model.kv_heads)
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # query head j reads j // group
        scores = q @ k.swapaxes(-1, -2) / sqrt(model.head_dim)
        weights = _softmax(np.where(causal, scores, -np.inf))
        mixed = _join(weights @ v)
        middle = x + _linear(params, "o", i, mixed, scale)
        h2 = _norm(middle, params["mlp_norm"][i], model.rms_eps)
        gate, up = _linear(params, "gate", i, h2, scale), _linear(params, "up", i, h2, scale)
        sigmoid = 1 / (1 + np.exp(-gate))
        inner = gate * sigmoid * up
        saved.append(
            {"x": x, "h": h, "q": q, "k": k, "v": v, "weights": weights, "mixed": mixed, "middle": middle}
            | {"heads_q": heads["q"], "heads_k": heads["k"]}
            | {"h2": h2, "gate": gate, "up": up, "sigmoid": sigmoid, "inner": inner}
        )
        x = middle + _linear(params, "down", i, inner, scale)
    final = _norm(x, params["norm"], model.rms_eps)
    return final @ (params["embed"].T if model.tied else params["head"]), saved, x


def forward(model: Model, params: Params, ids: Ints, scale: float) -> Array:
    """Logits [B, S, V] of ids [B, S]."""
    return _run_forward(model, params, ids, scale)[0]


def loss_and_grads(
    model: Model, params: Params, ids: Ints, lengths: Ints, scale: float
) -> tuple[float, int, Params]:
    """Summed cross entropy (nats), number of targets, and the sum's gradient for every name in `params`.

    ids is [B, S + 1]; the target at t (of S) counts when t < length - 1.
    """
    inputs, targets = ids[:, :-1], ids[:, 1:]
    counted = np.arange(targets.shape[1]) < np.asarray(lengths)[:, None] - 1
    logits, saved, last = _run_forward(model, params, inputs, scale)
    shifted = logits - logits.max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    picked = np.take_along_axis(logp, targets[..., None], -1)[..., 0]
    loss = float(-np.where(counted, picked, 0.0).sum())

    grads = {name: np.zeros_like(value) for name, value in params.items()}
    dlogits = np.exp(logp)
    dlogits[(*np.indices(targets.shape), targets)] -= 1
    dlogits = np.where(counted[..., None], dlogits, 0.0)
    final = _norm(last, params["norm"], model.rms_eps).reshape(-1, model.hidden)
    dhead = final.T @ dlogits.reshape(-1, model.vocab)
    if model.tied:
        grads["embed"] += dhead.T
        dfinal = dlogits @ params["embed"]
    else:
        grads["head"] += dhead
        dfinal = dlogits @ params["head"].T
    dx, grads["norm"] = _norm_back(last, params["norm"], model.rms_eps, dfinal)
    for i in reversed(range(model.layers)):
        dx = _layer_back(model, params, grads, i, saved[i], dx, scale)
    np.add.at(grads["embed"], inputs, dx)
    return loss, int(counted.sum()), grads


def _layer_back(
    model: Model, params: Params, grads: Params, i: int, c: Params, dy: Array, scale: float
) -> Array:
    """Backward through layer i with values c: from its output's gradient to its input's; adds to `grads`."""
    dinner = _linear_back(params, grads, "down", i, c["inner"], dy, scale)
    silu = c["gate"] * c["sigmoid"]
    dgate = dinner * c["up"] * (c["sigmoid"] + silu * (1 - c["sigmoid"]))
    dh2 = _linear_back(params, grads, "gate", i, c["h2"], dgate, scale)
    dh2 = dh2 + _linear_back(params, grads, "up", i, c["h2"], dinner * silu, scale)
    dmiddle, grads["mlp_norm"][i] = _norm_back(c["middle"], params["mlp_norm"][i], model.rms_eps, dh2)
    dmiddle = dmiddle + dy

    def gather(d: Array) -> Array:
        """The adjoint of repeating each key-value head over its group of query heads."""
        return d.reshape(d.shape[0], model.kv_heads, -1, *d.shape[2:]).sum(2)

    dmixed = _split(_linear_back(params, grads, "o", i, c["mixed"], dmiddle, scale), model.heads)
    dv = gather(c["weights"].swapaxes(-1, -2) @ dmixed)
    dweights = dmixed @ c["v"].swapaxes(-1, -2)
    dscores = c["weights"] * (dweights - (dweights * c["weights"]).sum(-1, keepdims=True))
    dscores = dscores / sqrt(model.head_dim)
    dq = _rotate(dscores @ c["k"], model, -1.0)
    dk = _rotate(gather(dscores.swapaxes(-1, -2) @ c["q"]), model, -1.0)
    dq = _head_norm_back(model, params, grads, "q", i, c["heads_q"], dq)
    dk = _head_norm_back(model, params, grads, "k", i, c["heads_k"], dk)
    dh = _linear_back(params, grads, "q", i, c["h"], _join(dq), scale)
    dh = dh + _linear_back(params, grads, "k", i, c["h"], _join(dk), scale)
    dh = dh + _linear_back(params, grads, "v", i, c["h"], _join(dv), scale)
    dx, grads["attention_norm"][i] = _norm_back(c["x"], params["attention_norm"][i], model.rms_eps, dh)
    return dx + dmiddle


def is_factor(name: str) -> bool:
    """Whether a parameter is an A or a B."""
    return name.endswith((".a", ".b"))


def trainable(params: Params, settings: Settings) -> list[str]:
    """Every name but those of kernels that have factors and, if A is frozen, of each A."""
    names = [name for name in params if f"{name}.a" not in params]
    return [name for name in names if settings.trains_a or not name.endswith(".a")]


def merged(params: Params, scale: float) -> Params:
    """The full-rank equivalent: W + scale A B for every kernel that has factors."""
    return {
        name: value + scale * (params[f"{name}.a"] @ params[f"{name}.b"]) if f"{name}.a" in params else value
        for name, value in params.items()
        if not is_factor(name)
    }


def magnitude_mask(moment: Array, fraction: float) -> Mask:
    """True at the round((1 - f) n) largest |moment| of each matrix [..., m, n]; ties: the lower index."""
    flat = np.abs(moment).reshape(-1, prod(moment.shape[-2:]))
    keep = round((1 - fraction) * flat.shape[-1])
    mask = np.zeros(flat.shape, dtype=bool)
    order = np.argsort(-flat, axis=-1, kind="stable")
    np.put_along_axis(mask, order[:, :keep], True, axis=-1)
    return mask.reshape(moment.shape)


@dataclass
class History:
    """The outcome of a run; in the low-rank phase `params` holds the live, unmerged factors."""

    params: Params
    mu: Params
    nu: Params
    count_factors: int = 0
    count_rest: int = 0
    tokens_seen: int = 0  # target tokens, those of skipped updates included
    skipped: int = 0
    losses: list[float] = field(default_factory=list)  # mean of each update; nan where it was skipped
    merges: list[int] = field(default_factory=list)
    resets: list[int] = field(default_factory=list)


def _start(u: int, settings: Settings, h: History, draw_a: Draw, draw_b: Draw | None) -> None:
    """Starts the low-rank phase: kernels freeze and lose their moments, factors get zero moments."""
    for name in settings.targets:
        kernel = h.params[name]
        a = np.asarray(draw_a(u, name), np.float64)
        if settings.base_init == "zero":
            assert draw_b is not None, "zero base kernels need a drawn B"
            h.params[name] = np.zeros_like(kernel)
            b = np.asarray(draw_b(u, name), np.float64)
        else:
            b = np.zeros((kernel.shape[0], settings.rank, kernel.shape[2]))
        assert a.shape == (*kernel.shape[:2], settings.rank), (name, a.shape)
        assert b.shape == (kernel.shape[0], settings.rank, kernel.shape[2]), (name, b.shape)
        del h.mu[name], h.nu[name]
        for factor, value in ((f"{name}.a", a), (f"{name}.b", b)):
            h.params[factor] = value
            if factor in trainable(h.params, settings):
                h.mu[factor], h.nu[factor] = np.zeros_like(value), np.zeros_like(value)
    h.count_factors = 0


def _merge(u: int, settings: Settings, h: History, draw_a: Draw) -> None:
    """W += scale * A @ B, A redrawn, B = 0: neither the function nor the statistics change."""
    h.params.update(merged(h.params, settings.scale))
    for name in settings.targets:
        h.params[f"{name}.a"] = np.asarray(draw_a(u, name), np.float64)
        h.params[f"{name}.b"] = np.zeros_like(h.params[f"{name}.b"])
    h.merges.append(u)


def _reset(u: int, settings: Settings, h: History, draw: DrawMask | None, adjust: AdjustMask | None) -> None:
    """Prune the factors' statistics, one mask for both moments; zeroes the factors' count if set."""
    for name in [n for n in h.mu if is_factor(n)]:
        if settings.prune == "zero":
            mask = np.zeros(h.mu[name].shape, dtype=bool)
        elif settings.prune == "magnitude":
            mask = magnitude_mask(h.mu[name], settings.fraction)
            mask = mask if adjust is None else np.asarray(adjust(u, name, mask, h.mu[name]), dtype=bool)
        elif settings.prune == "random":
            assert draw is not None, "random pruning needs its masks"
            mask = np.asarray(draw(u, name), dtype=bool)
        else:
            mask = np.ones(h.mu[name].shape, dtype=bool)
        assert mask.shape == h.mu[name].shape, (name, mask.shape)
        h.mu[name], h.nu[name] = np.where(mask, h.mu[name], 0.0), np.where(mask, h.nu[name], 0.0)
    if settings.reset_count:
        h.count_factors = 0
    h.resets.append(u)


def _adamw(u: int, settings: Settings, h: History, grads: Params) -> None:
    """p -= lr (m^ / (sqrt(v^) + eps) + decay p), with m^ and v^ corrected by the leaf's own group's count."""
    lr = rate(u, settings)
    h.count_rest += 1
    if any(is_factor(name) for name in grads):
        h.count_factors += 1
    for name, g in grads.items():
        count = h.count_factors if is_factor(name) else h.count_rest
        leaf_lr = lr
        if is_factor(name):
            leaf_lr = lr * settings.factor_lr_ratio
        elif name in KERNELS:
            leaf_lr = lr * settings.kernel_lr_ratio
        decay = 0.0 if name in NORMS else settings.weight_decay
        h.mu[name] = settings.b1 * h.mu[name] + (1 - settings.b1) * g
        h.nu[name] = settings.b2 * h.nu[name] + (1 - settings.b2) * g * g
        m = h.mu[name] / (1 - settings.b1**count)
        v = h.nu[name] / (1 - settings.b2**count)
        h.params[name] = h.params[name] - leaf_lr * (m / (np.sqrt(v) + settings.eps) + decay * h.params[name])


def run(
    model: Model,
    settings: Settings,
    initial: Params,
    batches: Callable[[int], tuple[Ints, Ints]],
    draw_a: Draw,
    draw_mask: DrawMask | None = None,
    adjust_mask: AdjustMask | None = None,
    draw_b: Draw | None = None,
    on_update: Callable[[int, Params], None] | None = None,
) -> History:
    """All N updates. Arrays are never changed in place, so what `on_update` receives remains valid.

    Update u: (1) at u = W the low-rank phase starts; else, at s > 0, a merge at each multiple of
    R / merges_per_cycle, and a reset as well at each multiple of R. (2) Losses and gradients are summed over
    the microbatches and divided once by the number of targets. (3) If the loss or the gradient norm is not
    finite or there are no targets, weights, moments and counts stay and the run continues. (4) Clip by the
    global norm of all trainable leaves. (5) AdamW at rate(u). (6) u += 1.
    """
    start = {name: np.array(value, np.float64) for name, value in initial.items()}
    zeros = {name: np.zeros_like(value) for name, value in start.items()}
    h = History(params=start, mu=dict(zeros), nu=dict(zeros))
    for u in range(settings.updates):
        s = u - settings.warm_start
        if settings.arm != "full" and s == 0:
            _start(u, settings, h, draw_a, draw_b)
        elif settings.arm == "relora" and s > 0 and s % (settings.cycle // settings.merges_per_cycle) == 0:
            _merge(u, settings, h, draw_a)
            if s % settings.cycle == 0:
                _reset(u, settings, h, draw_mask, adjust_mask)

        with np.errstate(all="ignore"):
            total, targets = 0.0, 0
            sums = {name: np.zeros_like(h.params[name]) for name in trainable(h.params, settings)}
            for ids, lengths in zip(*batches(u), strict=True):
                part, count, grads = loss_and_grads(model, h.params, ids, lengths, settings.scale)
                total, targets = total + part, targets + count
                sums = {name: value + grads[name] for name, value in sums.items()}
            loss = total / targets if targets else float("nan")
            mean = {name: value / max(targets, 1) for name, value in sums.items()}
            norm = sqrt(sum(float((g * g).sum()) for g in mean.values()))
        h.tokens_seen += targets
        if targets and isfinite(loss) and isfinite(norm):
            if settings.clip_norm and norm > settings.clip_norm:
                mean = {name: g * (settings.clip_norm / norm) for name, g in mean.items()}
            _adamw(u, settings, h, mean)
            h.losses.append(loss)
        else:
            h.skipped += 1
            h.losses.append(float("nan"))
        if on_update is not None:
            on_update(u + 1, dict(h.params))
    return h
