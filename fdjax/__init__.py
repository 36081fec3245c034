"""fdjax: federated distillation, simulated in JAX.

A method is written for one client; `fdjax.simulate` runs it for thousands in one compiled step.
"""

from fdjax.runtime import work_around_xla_cpu

__version__ = "0.1.0"

work_around_xla_cpu()
