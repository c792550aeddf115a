r"""Exact perturbation of every sample at the price of SAM (``--sam-perturbation instance``).

.. math:: G^* = \sum_i \nabla\ell_i(w + \epsilon_i), \qquad \epsilon_i = s_i g_i, \quad s_i = \rho / \|g_i\|

1. Record (``recording``): run the forward pass, and note every call of a known layer (``layers/``) with its input
   rows. ``interception`` sees the calls.
2. Backward (``engine``, ``passes``): from the losses to the output gradients of these calls, and to no parameter.
   ``ownership`` and ``layout`` say which row belongs to which sample, ``familiarity`` (by ``operations``) and
   ``entanglement`` when that must be looked up again, ``coverage`` which parameters are perturbed, ``planning`` in
   which form their gradients are kept.
3. Per-sample gradients (``gradients``): :math:`G_i = \sum_t b_{it} a_{it}^\top`, kept as factors of inputs a and output
   gradients b (``factored``), or formed where that is cheaper; their norms, and the steps :math:`s_i`.
4. Perturbed replay (``solution``): run the forward pass again. Each layer adds :math:`s_i G_i x` to its output, in
   matrix products over all samples. An ordinary backward pass then gives :math:`G^*`.

``perturbation`` puts the four steps behind the protocol that ``loss`` expects.
"""

from deltasam_plugin.instance.engine import InstanceEngine
from deltasam_plugin.instance.perturbation import InstancePerturbation
from deltasam_plugin.instance.solution import Solution

__all__ = ["InstanceEngine", "InstancePerturbation", "Solution"]
