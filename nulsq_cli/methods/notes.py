"""What `docs/methods.md` says of each method beyond its docstrings: formula, gradient, what it was checked against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """One method's mathematics in plain text.

    Args:
        formula: from x to the quantized y.
        gradient: what x and the parameters get from g = dLoss/dy.
        checked: whose numbers the tests compare with.
        learned: what the steps' optimizer moves, per table.
        start: what the initialisation rules make of that; `paper` is the authors' own.
    """

    formula: str
    gradient: str
    checked: str
    learned: str
    start: str


_EVEN = "dx = g inside the ends, 0 outside; ds = g·(round(x/s) − x/s) inside, g·(the end's code) outside"
_TABLE = (
    "dx = g inside the ends, 0 outside; a level between two neighbours gets ±g·(round(t) − t), t the place of x in the gap; "
    "the end levels get g from beyond; sums of gaps carry it on"
)
_AUTHORS = "vectors computed by the authors' released code (outputs, gradients of x and of all steps)"

NOTES: dict[str, Note] = {
    "lsq": Note("y = s·round(clip(x/s, −n, p)), n and p the codes below and above zero", _EVEN,
                "vectors computed by the LSQ of the nuLSQ authors' released code; examples by hand",
         "the step s",
         "even rules (`lsq`, `nmse`, `mse`) as they are, `lloyd` as `mse`; `paper` is `lsq`, 2·mean|x|/√p"),
    "nulsq-a": Note("y = the nearest of the levels 0, s₁, s₁+s₂, … ; weights as lsq", _TABLE, _AUTHORS,
         "inputs: 2ᵇ−1 gaps; weights: the step",
         "inputs: `lloyd` gap by gap, even rules with all gaps alike, `paper` is `nmse`; weights as lsq"),
    "nulsq-w": Note("as nulsq-a for weights, with gaps on both sides of 0; inputs as lsq", _TABLE, _AUTHORS,
         "weights: 2ᵇ−1 gaps; inputs: the step",
         "weights: `lloyd` gap by gap, even rules with all gaps alike, `paper` is `nmse`; inputs as lsq"),
    "nulsq-wa": Note("as nulsq-a for inputs and weights", _TABLE, _AUTHORS,
         "2ᵇ−1 gaps",
         "`lloyd` gap by gap, even rules with all gaps alike; `paper` is `nmse`, the best even step for a "
         "normal distribution of the measured width"),
    "uniq": Note("signed: y = s·(round(clip(x/s + ½·(2ᵇ−1), 0, 2ᵇ−1)) − ½·(2ᵇ−1)); unsigned: as lsq", _EVEN,
                 "vectors computed by the authors' released code, which also check the nmse start",
         "the step s",
         "as lsq; `paper` is `nmse`, which is made for levels without a zero"),
    "pact": Note("y = (a/N)·round(clip(x, 0, a)·N/a), N = 2ᵇ−1; weights as dorefa",
                 "dx = g for 0 ≤ x < a; da = g for x ≥ a, nothing inside; plus the penalty's",
                 "float64 derivation; equality with lsq but for the residual",
         "inputs: the clip a; weights: nothing",
         "the largest level of an even rule, `lloyd` as `mse`; `paper` is the constant `alpha`"),
    "dorefa": Note("weights: y = 2·q(tanh(w)/(2·max|tanh(w)|) + ½) − 1; inputs: y = q(clip(x, 0, 1)); q(r) = round(N·r)/N",
                   "dw = g·(1 − tanh²(w))/max|tanh(w)|, the maximum a constant; dx = g inside [0, 1]",
                   "float64 derivation; an example by hand",
         "nothing",
         "nothing to start: no rule changes it"),
    "ewgs": Note("v = clip((x − l)/(u − l), 0, 1); y = round(v·N)/N for inputs, |o|·(2·round(v·N)/N − 1) for weights",
                 "dv = g·(1 + δ·sign(g)·(v − q)), q = round(v·N)/N; l and u get it through v, and o what multiplies it; "
                 "δ = max(0, Tr(H)/n/(3·std(dLoss/dq))), H the Hessian of the loss in the n entries of q",
                 "vectors of the discretizer computed by the authors' released code; with δ = 0 plain straight-through; "
                 "δ against Hessians written out entry by entry",
         "the interval's ends l and u; weights: o, too",
         "ends so that levels lie one step of an even rule apart, `lloyd` as `mse`; `paper` takes three "
         "standard deviations, for unsigned inputs of the half normal; o so that a layer's output keeps "
         "its size"),
    "llsq": Note("y = a·clip(round(x/a), −n, p)",
                 "dw = g everywhere, dx = g inside the ends; a gets −a² if 2a errs least, +a² if a/2 does, 0 else",
                 "float64 derivation of every case of the decision, for squared and absolute errors",
         "the step a, by its own rule",
         "as lsq; `paper` divides the largest magnitude by the codes above zero, for inputs below 4 bits by "
         "that"),
    "lcq": Note("y = sign(x)·a·f⁻¹(round(S·f(|x|/a))/S) below the clip a; f is piecewise linear, its slopes a softmax of θ; "
                "weights are normalised first and multiplied by their deviation afterwards",
                "dx = g for |x| < a; da = g·(y − x)/a inside, g·sign(x) outside; θ through slopes and offsets of both bins",
                "vectors computed by the nuLSQ authors' port; an example by hand; `level_bits`, which it has not, by definition",
         "the clip a and 16 slopes θ, where there is a curve",
         "the straight curve, and the clip with the least squared error (`lloyd`, `mse`) or of an even "
         "rule; `paper` is 3 for weights and 8 for inputs"),
    "apot": Note("y = a·sign(x)·nearest(G, min(|x|/a, 1)), G the sums of powers of two; weights are normalised first and stay so",
                 "da = g·(y − x)/a inside, g·sign(x) outside; dx as `weight_gradient` says for weights, clipped for inputs",
                 "vectors computed by the authors' released code; an example by hand",
         "the clip a",
         "the clip with the least squared error (`lloyd`, `mse`) or of an even rule; `paper` is 3 for "
         "weights and 8 for inputs"),
    "lq-nets": Note("y = the nearest of B·v, B all codes in {−1, 1}ᵇ for signed and {0, 1}ᵇ for unsigned tensors",
                    "dw = g everywhere, dx = g up to the last level; every training pass: v ← 0.9·v + 0.1·argmin|x − B·v|²",
                    "float64 solution of the normal equations",
         "nothing by gradients; the basis v is fitted",
         "an even basis (`mse`, `nmse`, `lsq`); `paper` is the authors' constants for a unit normal, "
         "weights by their width; `lloyd` fits codes and basis in turn from there, at the measured width"),
    "duq": Note("unsigned: y = c·round(N·clip(x/a, 0, 1))/N; signed: the same on [−1, 1] with 2ᵇ−1 levels",
                "dx = g·c/a inside; da = −g·c·x/a² inside; dc = g·y/c; both times the slope of their softplus",
                "vectors computed by the authors' released code; with c tied to a equality with lsq",
         "the scales a and c, through a softplus",
         "both alike: of the least squared error (`lloyd`, `mse`) or of an even rule; `paper` is 0.9 of "
         "the largest weight, for inputs the 95th percentile of the magnitudes that are not zero"),
}  # fmt: skip
"""Method -> its note; a method without one has a section without these lines."""

EQUATIONS: dict[str, str] = {
    "bin-reg": "loss + λ·Σ over layers and bins of the mean over the bin of (w − L)²; L the bin's level, which is moved, too",
    "dampening": "loss + λ·Σ over layers of Σ (clip(w) − L)²; a sum over output channels and a mean over the rest, L a constant",
    "freezing": "f ← m·[a change of code takes the last one back] + (1 − m)·f; f above the threshold: the code becomes the "
                "rounded moving average of codes, and stays",
    "plain": "task loss",
    "kd": "task_weight·task loss + weight·T²·KL(softmax(teacher/T) ‖ softmax(student/T))",
    "qkd": "labels; then both networks' kd loss against each other, each taking the other's logits as constants; then kd",
    "profit": "kd in every phase; instability of a layer: the KL divergence of two Gaussians fitted to its output before and "
              "after an update's change of codes, mean over channels and a moving average over updates",
}  # fmt: skip
"""Stabilizer or scheme -> its mathematics in plain text."""
