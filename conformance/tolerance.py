"""The bounds of float32 arithmetic's error from the float64 numbers: every case's "tolerance".

The bounds count the roundings of a plain float32 step with scalars in float64. The frameworks' own float32 runs, which
the vectors keep, confirm the bounds. A wrong formula misses by thousands of ulps.
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
    """Tell whether decay may multiply the parameter by its own factor; Lion and optax may add it to the update too."""
    optimizer = config["optimizer"]
    lion = optimizer["rule"] == "RULE_LION" and "weightDecay" in optimizer.get("hyperparameters", {})
    return lion or bool(optimizer.get("decoupledWeightDecay"))


def _parameter_ulps(config: Json) -> float:
    """Count half an ulp a rounding: the update's, torch's second one in NAdam, the decay's factor and its product."""
    return 0.5 + 0.5 * (config["optimizer"]["rule"] == "RULE_NADAM") + 1.0 * _decays_apart(config)


def _relative(config: Json) -> float:
    """Allow more if every step rounds the same way: with a constant factor of the parameter, or a constant step."""
    constant = config["optimizer"]["rule"] in ("RULE_LION", "RULE_ADAMAX")
    return 5e-5 if constant or _decays_apart(config) else 1e-5
