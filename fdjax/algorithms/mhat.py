"""MHAT: a model of the server's between what clients say of public data and what they learn of it.

Hu, Guo, Gong, "MHAT: An Efficient Model-Heterogenous Aggregation Training Scheme for Federated Learning" (Information
Sciences 2021). We had its abstract: clients of any architectures send predictions on public data, the server trains an
auxiliary model on their aggregate, and what that model predicts goes back to be distilled. The equations are our
concretisation, and a round is one of DS-FL (`dsfl.py`):

    update:     train w_k on the private data by CE
    predict:    p_k(x) = softmax(w_k(x)) for x in o_t, public data
    aggregate:  the server minimises CE(p(x), softmax(w(x))), p(x) = (1 / m) sum_k p_k(x)
    distil:     clients minimise CE(softmax(w(x)), softmax(w_k(x))) over x in o_t, w as trained just now: the slope
                of KL(softmax(w(x)) || softmax(w_k(x)))

The server's model w goes on from round to round, and is the central one.

Sent: as in DS-FL, the ids of o_t down (4n bytes, none where it is all public data), p_k up and the server's predictions
down, 4nK each. Models stay where they are. With `selection` (`exchange/selection.py`) the server's model learns what is
selected, and what it predicts for all of o_t goes down.
"""

import jax

from fdjax.algorithms import dsfl
from fdjax.contract import Algorithm
from fdjax.exchange import proxy, selection
from fdjax.method import Method, Task


def mhat(task: Task) -> Algorithm:
    """MHAT; the task's model is the server's; hparams: see METHOD."""
    return dsfl.dsfl(task, lambda ctx, params, ids: jax.nn.softmax(proxy.predict(ctx, params, ids)))


METHOD = Method(
    name="mhat",
    summary="MHAT (Hu et al. 2021): mean outputs on proxy data teach the server's model, whose outputs teach clients",
    build=mhat,
    hparams={name: record for name, record in dsfl.METHOD.hparams.items() if not record.only} | selection.HPARAMS,
    options=selection.OPTION,
    proxy="unlabelled",
    stages=("distill",),
    keeps_models=True,
    example_fits=1,
    needs_numbers_for=selection.DISTANCES,
    distils=True,
)
