"""A setting that breaks its rule is refused, with value, rule and remedy."""

import math

import numpy as np
import pytest

from deltasam_plugin import Settings
from deltasam_plugin.batch.weighting import WEIGHTINGS
from deltasam_plugin.settings import PERTURBATIONS


@pytest.mark.parametrize("rho", [-0.1, -1e-300, math.nan, math.inf, -math.inf, "0.05"])
def test_rho_must_be_finite_and_not_negative(rho):
    with pytest.raises(ValueError, match="Invalid rho") as error:
        Settings(rho=rho)
    assert str(error.value) == (
        f"Invalid rho={rho!r} (--sam-rho). Must be a finite number >= 0; 0.05 is the usual start."
    )


@pytest.mark.parametrize("weighting", ["Curvature", "", "random", None])
def test_the_weighting_must_be_known(weighting):
    with pytest.raises(ValueError, match="Unknown weighting") as error:
        Settings(weighting=weighting)
    assert str(error.value) == (
        f"Unknown weighting={weighting!r} (--sam-weighting). Choose one of: {', '.join(WEIGHTINGS)}; "
        "or register one of your own, with @deltasam_plugin.weighting."
    )


@pytest.mark.parametrize("probes", [0, -1, 1.5, 2.0, True, math.nan, math.inf])
def test_probes_must_be_a_positive_integer(probes):
    with pytest.raises(ValueError, match="probes") as error:
        Settings(probes=probes)
    assert str(error.value) == (
        f"Invalid probes={probes!r} (--sam-probes). Must be an integer >= 1; "
        "for no probes at all use the weighting 'uniform'."
    )


@pytest.mark.parametrize("scale", [0.0, -0.01, 1.0, 1.5, math.nan, math.inf, "0.01", None])
def test_the_probe_scale_must_be_a_fraction(scale):
    with pytest.raises(ValueError, match="Invalid probe_scale") as error:
        Settings(probe_scale=scale)
    assert str(error.value) == (
        f"Invalid probe_scale={scale!r} (--sam-probe-scale). Must be a fraction of the norm of the "
        "weights, between 0 and 1 exclusive; 0.01 is the default."
    )


@pytest.mark.parametrize("perturbation", ["sample", "Batch", None])
def test_the_perturbation_must_be_known(perturbation):
    with pytest.raises(ValueError, match="Unknown perturbation") as error:
        Settings(perturbation=perturbation)
    assert str(error.value) == (
        f"Unknown perturbation={perturbation!r} (--sam-perturbation). Choose one of: {', '.join(PERTURBATIONS)}."
    )


def test_the_defaults_are_those_of_the_contract_and_valid():
    assert Settings() == Settings(0.05, "curvature", 1, 0.01, "batch")


def test_the_smallest_values_are_valid():
    assert Settings(rho=0, weighting="uniform", probe_scale=5e-324).rho == 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_listed_weighting_is_accepted(weighting):
    assert Settings(weighting=weighting).weighting == weighting


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(AttributeError):
        Settings().rho = 1.0


def test_numbers_of_numpy_are_numbers() -> None:
    assert Settings(np.float64(0.05), probes=np.int64(2)) == Settings(0.05, probes=2)
