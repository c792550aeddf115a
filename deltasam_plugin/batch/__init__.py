r"""One perturbation for the whole batch (``--sam-perturbation batch``).

.. math:: \epsilon = \rho\,\frac{\sum_i v_i g_i}{\|\sum_i v_i g_i\|}

======================  ==================================================================
``perturbation.py``     one (micro-)batch: probe, ascend, be at the perturbed weights
``probing.py``          per-sample losses on both sides of the weights along random directions
``weighting.py``        from these losses to the weights v
``displacement.py``     move parameters and restore them bit for bit
``workers.py``          data-parallel workers that share one perturbation
======================  ==================================================================
"""
