r"""One perturbation for the whole batch (``--sam-perturbation batch``).

.. math:: \epsilon = \rho\,\frac{\sum_i v_i g_i}{\|\sum_i v_i g_i\|}

======================  ==================================================================
``perturbation.py``     one (micro-)batch: probe, weigh, ascend
``probing.py``          per-sample losses at both ends of random displacements
``measures.py``         from these losses to what a probe measures of each sample
``weighting.py``        from these measures to the weights v of the samples
``momentum.py``         directions by the base optimizer's momentum
``descent.py``          from the gradients at w and at w + ε to the one that is handed over
``orthogonal.py``       the part of a vector that is orthogonal to another
``displacement.py``     move parameters: along steps, or up a gradient
``restoration.py``      restore them bit for bit
``norms.py``             norms of many tensors, in few kernels
``workers.py``          data-parallel workers that share one perturbation
======================  ==================================================================
"""
