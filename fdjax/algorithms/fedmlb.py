"""FedMLB: the client's blocks have to go with the global model's.

Kim, Kim, Han, "Multi-Level Branched Regularization for Federated Learning" (ICML 2022). We had its released code and
Flower's baseline, not its text, so equation numbers are missing here. A net is B blocks, one after another; g is the
received model, which is fixed, and p are softmax outputs.

    hybrid branch b = 1 .. B - 1:   q_b = softmax of g's blocks b + 1 .. B on what w_k's blocks 1 .. b give
    client:  w_k <- w;  E epochs of  CE(p, y) + (1 / (B - 1)) sum_b [l_1 CE(q_b, y) + l_2 KL(q_b || p)]
    server:  w <- sum_k (n_k / n) w_k,  n = sum_k n_k, over the participants of the round

l_1 = `hybrid_weight`, l_2 = `distill_weight`, both 1 in the code. Gradients flow through w_k's blocks of both terms, so
q_b is not a fixed teacher. With l_1 = l_2 = 0 it is FedAvg.

Sent: w down and w_k up, 4P bytes each way, as in FedAvg. A step costs w_k's pass forward and back, and B - 1 passes of
parts of g, forward and back to their inputs.

Ours: the blocks are those of the model's module (CONTRIBUTING.md), where the paper cuts ResNet-18 at its stages; g's
are in test mode. The code clips gradients to 10 (`--clip_norm`), decays weights by 1e-3, has a rate of 0.1 that falls
by 0.998 a round and 50 local steps (`--local_steps`).

Accuracy for three seeds of `test_local_distillation_learning.py`, of a 2NN: 0.731, 0.769, 0.679 with both weights 1,
which is no better than FedAvg (0.765, 0.764, 0.696); 0.796, 0.786, 0.764 with l_1 = 0.3 and l_2 = 3. In
`benchmarks.local_distillation` it is 0.9 to 4.2 points below FedAvg, and with those weights 1.8, -1.2 and 2.7 above.
"""

from fdjax.client import losses
from fdjax.contract import Algorithm
from fdjax.exchange import averaging
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task


def fedmlb(task: Task) -> Algorithm:
    """FedMLB of the task's model; hparams: `learning_rate`, `local_epochs`, `hybrid_weight`, `distill_weight`."""
    smoothing = task.training.label_smoothing

    def objective(ctx, w, params, x, y, key):
        blocks, h, hybrid = ctx.model.blocks, x, []
        for b, block in enumerate(blocks[:-1]):
            h = q = block(params, h, key)
            for frozen in blocks[b + 1 :]:
                q = frozen(w, q)
            hybrid.append(q)
        z = blocks[-1](params, h, key)
        labels = sum(losses.cross_entropy(q, y, smoothing) for q in hybrid) / len(hybrid)
        apart = sum(losses.kl_divergence(q, z) for q in hybrid) / len(hybrid)
        hard = losses.cross_entropy(z, y, smoothing)
        return hard + ctx.hparams["hybrid_weight"] * labels + ctx.hparams["distill_weight"] * apart

    return averaging.with_objective(task, objective)


METHOD = Method(
    name="fedmlb",
    summary="FedMLB (Kim et al. 2022): FedAvg whose clients' blocks are taught through the global model's",
    build=fedmlb,
    hparams={
        **LOCAL_TRAINING,
        "hybrid_weight": HParam(1.0, help="weight of the labels' loss of hybrid branches"),
        "distill_weight": HParam(1.0, help="weight of the divergence between hybrid branches and the client's model"),
    },
    one_architecture=True,
    parts=True,
    averages=True,
    example_fits=1,
)
