"""Losses of a pair of responses: what each makes of the log-ratios of the chosen and the rejected one.

Every loss is a pure function of `LogRatios` and gives a loss per pair, (P,), with gradient. In the formulas c and r are
the log-ratios of the chosen and the rejected response, d = c - r, b is `beta` > 0 (the strength of the pull towards
the reference; typical 0.01-0.5), and sig is the logistic function, so that 1 - sig(x) = sig(-x).
`PREFERENCE_LOSSES` names them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lf_lightning.types import InputError

ROBUST_SMOOTHING, EXO_SMOOTHING = 0.1, 1e-3
"""Label smoothing of `exo_pair_loss` where none is asked for."""


class LogRatios(NamedTuple):
    """How much likelier the policy finds each response of P pairs than the reference does, in nats.

    Summed over the tokens of the response; for losses of means the mean per token; for losses without a reference the
    mean log-prob of the policy alone.
    """

    chosen: Tensor  # (P,) with gradient
    rejected: Tensor  # (P,) with gradient

    @property
    def margin(self) -> Tensor:
        """By how much the chosen one is ahead: d = c - r; (P,)."""
        assert self.chosen.shape == self.rejected.shape, f"{self.chosen.shape} chosen, {self.rejected.shape} rejected"
        return self.chosen - self.rejected


class Rewards(NamedTuple):
    """The rewards that a policy implies for each response, in units of 1; no gradient."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)


class StepKL(NamedTuple):
    """max(0, mean of the log-ratios over the step) of each side, in nats; scalars >= 0, no gradient."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class PreferenceConstants:
    """Constants that only some losses read.

    Args:
        label_smoothing: Share of pairs whose label is taken to be wrong, in [0, 0.5). Empty: 0 for `sigmoid`, 0.1 for
            `robust`, 0.001 for `exo_pair`; the last two have no 0.
        simpo_gamma: Margin by which the chosen reward should be ahead, >= 0: `simpo`.
        discopop_tau: Log-ratio over which one form turns into the other, > 0: `discopop`.
    """

    label_smoothing: float | None = None
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        for name, holds, want in (
            ("label_smoothing", self.label_smoothing is None or 0 <= self.label_smoothing < 0.5, "in [0, 0.5)"),
            ("simpo_gamma", 0 <= self.simpo_gamma < torch.inf, "0 or more"),
            ("discopop_tau", 0 < self.discopop_tau < torch.inf, "positive"),
        ):
            if not holds:
                where = f"model.init_args.constants.{name}"
                raise InputError(f"{where}: must be {want}, got {vars(self)[name]}. Correct it.")


def preference_rewards(ratios: LogRatios, *, beta: float) -> Rewards:
    """Reward that the policy implies for each response: beta times its log-ratio; no gradient.

    Source: Rafailov et al. 2023, arXiv:2305.18290, section 5.
    """
    return Rewards(beta * ratios.chosen.detach(), beta * ratios.rejected.detach())


def sigmoid_loss(ratios: LogRatios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation: -(1 - e) log sig(b d) - e log sig(-b d), e = label_smoothing in [0, 0.5).

    Source: DPO, Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing after cDPO, Mitchell 2023.
    """
    scaled = beta * ratios.margin
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def sigmoid_norm_loss(ratios: LogRatios, *, beta: float) -> Tensor:
    """DPO on means per token: -log sig(b d). Here beta is larger, typically 5, since a mean is smaller than a sum.

    Source: length-normalised DPO, Lambert et al. 2024, arXiv:2411.15124.
    """
    return -F.logsigmoid(beta * ratios.margin)


def hinge_loss(ratios: LogRatios, *, beta: float) -> Tensor:
    """Sequence likelihood calibration: max(0, 1 - b d).

    Source: SLiC-HF, Zhao et al. 2023, arXiv:2305.10425; normalised by the reference as in RSO, Liu et al. 2023,
    arXiv:2309.06657, section 3.2.
    """
    return F.relu(1 - beta * ratios.margin)


def ipo_loss(ratios: LogRatios, *, beta: float) -> Tensor:
    """Identity preference optimisation, on means per token: (d - 1 / (2 b))^2.

    Source: IPO, Azar et al. 2023, arXiv:2310.12036, eq. 17 (beta is its tau). Departs from it: means, not sums.
    """
    return (ratios.margin - 1 / (2 * beta)).square()


def kto_pair_loss(ratios: LogRatios, *, beta: float, kl: StepKL) -> Tensor:
    """Kahneman-Tversky loss of both halves of a pair, each against the divergence of the other side.

    [1 - sig(b (c - kl.rejected))] / 2 + [1 - sig(b (kl.chosen - r))] / 2

    Args:
        ratios: Log-ratios of sums; (P,) each.
        beta: As above.
        kl: Divergence of each side over the whole step, no gradient.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306: the form for pairs that was released beside it. Departs from that:
    the mean of the two halves, where it lists them as rows of their own.
    """
    assert not any(side.requires_grad for side in kl), "the KL of a step has no gradient"
    of_chosen = torch.sigmoid(beta * (kl.rejected - ratios.chosen))
    of_rejected = torch.sigmoid(beta * (ratios.rejected - kl.chosen))
    return (of_chosen + of_rejected) / 2


def robust_loss(ratios: LogRatios, *, beta: float, label_smoothing: float = ROBUST_SMOOTHING) -> Tensor:
    """DPO without the bias of flipped labels: [-(1 - e) log sig(b d) + e log sig(-b d)] / (1 - 2 e), e in [0, 0.5).

    Source: rDPO, Chowdhury et al. 2024, arXiv:2403.00409. May be negative; with e = 0 it is `sigmoid_loss`.
    """
    scaled = beta * ratios.margin
    clean = -(1 - label_smoothing) * F.logsigmoid(scaled)
    flipped = -label_smoothing * F.logsigmoid(-scaled)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def exo_pair_loss(ratios: LogRatios, *, beta: float, label_smoothing: float = EXO_SMOOTHING) -> Tensor:
    """Reverse KL between the policy's preference and the data's: q log(q / (1 - e)) + (1 - q) log((1 - q) / e).

    q = sig(b d), e = label_smoothing in (0, 0.5): there is no value at 0.

    Source: EXO, Ji et al. 2024, arXiv:2402.00856, eq. 16.
    """
    scaled = beta * ratios.margin
    smoothing = torch.as_tensor(label_smoothing, dtype=scaled.dtype, device=scaled.device)
    chosen = torch.sigmoid(scaled) * (F.logsigmoid(scaled) - torch.log1p(-smoothing))
    return chosen + torch.sigmoid(-scaled) * (F.logsigmoid(-scaled) - smoothing.log())


def nca_pair_loss(ratios: LogRatios, *, beta: float) -> Tensor:
    """Noise contrastive alignment of a pair: -log sig(b c) - log sig(-b c) / 2 - log sig(-b r) / 2.

    Source: NCA, Chen et al. 2024, arXiv:2402.05369, with two responses and hard labels.
    """
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


def bco_shifted_loss(ratios: LogRatios, *, beta: float, delta: float | Tensor) -> Tensor:
    """Binary classifier of liked and disliked responses: -log sig(b c - delta) - log sig(-(b r - delta)).

    Args:
        ratios: Log-ratios of sums; (P,) each.
        beta: As above.
        delta: Running mean of the rewards b c and b r of all steps so far, no gradient; scalar.

    Source: BCO, Jung et al. 2024, arXiv:2404.04656. Departs from it: the two sides' prompts are not weighted
    to match.
    """
    return -F.logsigmoid(beta * ratios.chosen - delta) - F.logsigmoid(delta - beta * ratios.rejected)


def bco_pair_loss(ratios: LogRatios, *, beta: float) -> Tensor:
    """`bco_shifted_loss` without its shift: -log sig(b c) - log sig(-b r)."""
    return bco_shifted_loss(ratios, beta=beta, delta=0.0)


def mixed_loss(loss: Tensor, bco: Tensor, *, weight: float) -> Tensor:
    """Weighted mean (loss + w bco) / (1 + w) of a preference loss and `bco_shifted_loss`, w >= 0; (P,)."""
    return (loss + weight * bco) / (1 + weight)


def sppo_hard_loss(ratios: LogRatios, *, beta: float) -> Tensor:
    """Self-play preference optimisation with certain labels: (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2.

    Source: SPPO, Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with a probability of 1 (beta is its 1 / eta).
    """
    half = 1 / (2 * beta)
    return (ratios.chosen - half).square() + (ratios.rejected + half).square()


def apo_zero_loss(ratios: LogRatios, *, beta: float) -> Tensor:
    """Anchored loss that makes chosen responses likelier and rejected ones less likely: 1 - sig(b c) + sig(b r).

    For data that is better than what the policy says. Source: APO, D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    return torch.sigmoid(-beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected)


def apo_down_loss(ratios: LogRatios, *, beta: float) -> Tensor:
    """Anchored loss that makes both responses less likely, the rejected one more so: sig(b c) + 1 - sig(b d).

    For data that is worse than what the policy says. Source: APO, D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    """
    return torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(-beta * ratios.margin)


def discopop_loss(ratios: LogRatios, *, beta: float, discopop_tau: float) -> Tensor:
    """A blend found by search: (1 - w) (-log sig(b d)) + w e^(-b d), w = sig(b d / discopop_tau).

    Source: DiscoPOP (log-ratio modulated loss), Lu et al. 2024, arXiv:2406.08414, eq. 5.
    """
    scaled = beta * ratios.margin
    # One exponent: e^(-b d) alone overflows where w is 0, and their product would be NaN.
    exponential = torch.exp(F.logsigmoid(scaled / discopop_tau) - scaled)
    return exponential - torch.sigmoid(-scaled / discopop_tau) * F.logsigmoid(scaled)


def orpo_loss(ratios: LogRatios, *, beta: float) -> Tensor:
    """Likelihood of the chosen response and odds ratio of the two: -c - b log sig(log odds(c) - log odds(r)).

    Here c and r are mean log-probs of the policy, < 0, and log odds(x) = x - log(1 - e^x). There is no reference.

    Source: ORPO, Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7 (beta is its lambda).
    """
    log_odds = ratios.margin - (_log_one_minus_exp(ratios.chosen) - _log_one_minus_exp(ratios.rejected))
    return -ratios.chosen - beta * F.logsigmoid(log_odds)


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, kept finite at 0: the odds of a certain response are then 1 / eps."""
    return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).eps)))


def simpo_loss(ratios: LogRatios, *, beta: float, simpo_gamma: float) -> Tensor:
    """Simple preference optimisation: -log sig(b (c - r) - gamma).

    Here c and r are mean log-probs of the policy and beta is larger, typically 2-2.5. There is no reference.

    Source: SimPO, Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    return -F.logsigmoid(beta * ratios.margin - simpo_gamma)


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss of the table, with all that its caller must know.

    Args:
        function: Called as `function(ratios, beta=, constants=, kl=)`; gives (P,). `kl` is None unless it is wanted.
        uses_means: The log-ratios are means per token, not sums.
        uses_reference: The log-ratios are against a reference.
        uses_step_kl: `kl` must be given.
        options: The fields of `PreferenceConstants` that it reads.
    """

    function: Callable[..., Tensor]
    uses_means: bool = False
    uses_reference: bool = True
    uses_step_kl: bool = False
    options: tuple[str, ...] = ()


def _entry(
    loss: Callable[..., Tensor],
    *options: str,
    uses_means: bool = False,
    uses_reference: bool = True,
    uses_step_kl: bool = False,
) -> PreferenceLoss:
    """Bring a loss to the calling convention of the table."""

    def function(ratios: LogRatios, *, beta: float, constants: PreferenceConstants, kl: StepKL | None = None) -> Tensor:
        assert kl is not None or not uses_step_kl, f"{loss.__name__} needs the KL of the step"
        wanted = {name: vars(constants)[name] for name in options}
        given = {name: value for name, value in wanted.items() if value is not None}
        return loss(ratios, beta=beta, **given, **({"kl": kl} if uses_step_kl else {}))

    return PreferenceLoss(function, uses_means, uses_reference, uses_step_kl, options)


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": _entry(sigmoid_loss, "label_smoothing"),
    "hinge": _entry(hinge_loss),
    "ipo": _entry(ipo_loss, uses_means=True),
    "kto_pair": _entry(kto_pair_loss, uses_step_kl=True),
    "robust": _entry(robust_loss, "label_smoothing"),
    "exo_pair": _entry(exo_pair_loss, "label_smoothing"),
    "nca_pair": _entry(nca_pair_loss),
    "bco_pair": _entry(bco_pair_loss),
    "sppo_hard": _entry(sppo_hard_loss),
    "apo_zero": _entry(apo_zero_loss),
    "apo_down": _entry(apo_down_loss),
    "discopop": _entry(discopop_loss, "discopop_tau"),
    "sigmoid_norm": _entry(sigmoid_norm_loss, uses_means=True),
    "orpo": _entry(orpo_loss, uses_means=True, uses_reference=False),
    "simpo": _entry(simpo_loss, "simpo_gamma", uses_means=True, uses_reference=False),
}
