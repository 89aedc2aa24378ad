"""How far from the float64 answer float32 arithmetic may end: the numbers of every case's "tolerance".

Counted from the roundings of a straightforward float32 step whose scalars are computed in float64, then checked
against the frameworks' own float32 runs, which the vectors keep. A wrong formula misses by thousands of ulps.
"""

from __future__ import annotations

from conformance.case import Case, Json

__all__ = ["tolerance"]

_DIVIDING = frozenset({"RULE_ADAM", "RULE_NADAM", "RULE_RADAM", "RULE_ADAMAX", "RULE_LAMB"})
_TRUSTING = frozenset({"RULE_LAMB", "RULE_LARS"})


def tolerance(case: Case) -> Json:
    """Return the bounds of a case."""
    return {
        "ulp_checkpoints": case.ulp_checkpoints,
        "update_ulps": _update_ulps(case.config),
        "parameter_ulps": _parameter_ulps(case.config),
        "relative": _relative(case.config),
        "state_relative": 1e-5,
        "telemetry_relative": 1e-6,
        **case.tolerance,
    }


def _update_ulps(config: Json) -> float:
    """Count 2 for products and sums, 2 more for a root and a quotient of moments, 2 more for every norm."""
    optimizer = config["optimizer"]
    clips = "clipGradNorm" in config.get("gradient", {}) or any("clipGradNorm" in g for g in config.get("groups", []))
    # Nesterov's m is a sum of two corrected terms, each with roundings of its own.
    looks_ahead = optimizer.get("formula") == "FORMULA_OPTAX" and optimizer.get("nesterov", False)
    return 2.0 + 2.0 * sum([optimizer["rule"] in _DIVIDING, optimizer["rule"] in _TRUSTING, clips, looks_ahead])


def _decays_apart(config: Json) -> bool:
    """Decay may multiply the parameter by a factor of its own. Lion's and optax's may also be part of the update."""
    optimizer = config["optimizer"]
    lion = optimizer["rule"] == "RULE_LION" and "weightDecay" in optimizer.get("hyperparameters", {})
    return lion or bool(optimizer.get("decoupledWeightDecay"))


def _parameter_ulps(config: Json) -> float:
    """Count half an ulp a rounding: the update's, torch's second one in NAdam, the decay's factor and its product."""
    return 0.5 + 0.5 * (config["optimizer"]["rule"] == "RULE_NADAM") + 1.0 * _decays_apart(config)


def _relative(config: Json) -> float:
    """Allow more where every step rounds the same way: a constant factor of the parameter, or a constant step."""
    constant = config["optimizer"]["rule"] in ("RULE_LION", "RULE_ADAMAX")
    return 5e-5 if constant or _decays_apart(config) else 1e-5
