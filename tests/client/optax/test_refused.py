"""Names of optax's that the package lacks: each says why, and what to use instead."""

from __future__ import annotations

import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import stepwire.optax  # noqa: E402
from stepwire.errors import UnsupportedFeatureError  # noqa: E402
from stepwire.optax.refused import refusal  # noqa: E402


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adagrad", "the server's rule .* `remote\\(stepwire.Adagrad"),
        ("adamaxw", "the server's Adamax has L2 decay"),
        ("radam", "the server's rule .* `remote\\(stepwire.RAdam"),
        ("lbfgs", "it evaluates the loss several times in one update, .* use optax.lbfgs"),
        ("yogi", "a server has no such rule; use optax.yogi"),
        ("scale_by_adam", r"use stepwire.optax.adam\(learning_rate\)"),
        ("scale_by_rms", r"use stepwire.optax.rmsprop\(learning_rate, eps_in_sqrt=False\)"),
        ("scale_by_schedule", r"use optax.scale_by_schedule in an optax.chain"),
        ("trace", r"use stepwire.optax.sgd\(learning_rate, momentum\)"),
    ],
)
def test_a_call_is_refused_in_words(name: str, words: str) -> None:
    assert hasattr(optax, name)
    function = getattr(stepwire.optax, name)
    with pytest.raises(UnsupportedFeatureError, match=f"^{name}: stepwire.optax does not have it: .*{words}") as error:
        function(0.1, b1=0.9)
    assert error.value.metadata["feature"] == name
    assert function.__name__ == name


def test_it_is_refused_where_it_is_imported_by_name_too() -> None:
    from stepwire.optax import scale_by_adam

    with pytest.raises(UnsupportedFeatureError, match="scale_by_adam"):
        scale_by_adam()


def test_every_optimizer_of_optax_is_served_or_refused() -> None:
    aliases = {
        name
        for name in dir(optax)
        if getattr(getattr(optax, name), "__module__", "") == "optax._src.alias" and not name[0].isupper()
    }
    assert {"adam", "lbfgs", "yogi"} <= aliases
    assert {name for name in aliases if name not in stepwire.optax.__all__ and refusal(name) is None} == set()


def test_the_named_counterparts_exist() -> None:
    for name in ("scale_by_adadelta", "scale_by_adam", "scale_by_lion", "scale_by_stddev"):
        counterpart = str(refusal(name).__doc__).partition("use stepwire.optax.")[2].partition("(")[0]
        assert counterpart in stepwire.optax.__all__


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such'$"):
        stepwire.optax.no_such  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'chain'; it is optax's own: use optax.chain$"):
        stepwire.optax.chain  # noqa: B018
