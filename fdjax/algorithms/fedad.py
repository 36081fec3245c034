"""FedAD, federated attention distillation: one shot, logits and attention maps of private models on public data.

Gong, Sharma, Karanam, Wu, Chen, Doermann, Innanje, "Ensemble Attention Distillation for Privacy-Preserving Federated
Learning" (ICCV 2021). We had its abstract and a survey's lines on it, so equation numbers are missing here, and what
stands here in equations is our concretisation. Client k has a model of any architecture, the server a student S; D is
unlabelled public data, n_k^c the number of k's examples of class c.

    client:  trains by CE;  for x in D:  z_k(x), and A_k^c(x) = relu(sum_d a_d^c h_d) / max_{c, i, j} of the same,
             h the last features with positions (i, j), a_d^c = mean_{ij} dz_k^c / dh_dij       (as Grad-CAM has it)
    server:  z^c = sum_k n_k^c z_k^c / sum_k n_k^c;  A_and = min_k A_k,  A_or = max_k A_k      (consensus, diversity)
             S minimises over x in D  KL(softmax(z) || softmax(z_S)) + lambda L_att,
             L_att = mean_{c, i, j} [(A_and - A_S)_+ + (A_S - A_or)_+]

So S may look where any client does, and has to where all do. Sent: z_k, A_k and n_k^c up, 4n (K + K h w) + 4K bytes for
n public examples and maps of h x w; ids of D down, none where it is all public data. Models stay where they are.
--rounds=1 is the paper's one shot; in further rounds, which are ours, everybody goes on from what they have.

Ours, beside the equations:
- Maps are the student's size: a client's are resized (linearly) before they are normalised.
- A map is normalised over all classes and positions of an example, and not over those of its class alone, so a class
  without evidence stays faint. A net without positions (an MLP) has maps of 1 x 1, which then still say something.
- A class that no participant holds gets the plain mean of the logits: what they learned about it is that it is not.
- lambda is `attention_weight` (1; with 0 it is class-weighted ensemble distillation); no temperature. "To convergence"
  is `local_epochs` = 20. All models start from draws of their own, the student from the run's central one.

One shot in `test_learning.py` (ten clients of Dirichlet(0.1), a 2nn): the student has 0.729, 0.735, 0.655, the clients
0.234, 0.248, 0.222, their ensemble 0.604, 0.486, 0.628 and one round of FedAvg 0.428, 0.437, 0.474. Attention adds
nothing that we could measure there: lambda = 0, 1, 10 give a small CNN's student 0.641, 0.641, 0.634 on average.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdjax.client import losses, testing
from fdjax.client.attention import Attentive
from fdjax.client.training import fit, fit_observing, local_work, of_stage, supervised
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload, own_model, predict_with_own_model
from fdjax.exchange import proxy, reductions
from fdjax.exchange.wrappers import after
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, epochs, learning_rate
from fdjax.types import PyTree

_BATCH = 256  # of predictions


class _Server(NamedTuple):
    params: PyTree
    ids: Any  # of the round's public data


def outside(maps: jax.Array, least: jax.Array, most: jax.Array) -> jax.Array:
    """L_att [B]: how far maps [B, K, h, w] lie below the intersection or above the union."""
    return jnp.mean(jax.nn.relu(least - maps) + jax.nn.relu(maps - most), (1, 2, 3))


def fedad(task: Task) -> Algorithm:
    """FedAD; the task's model is the student; hparams: see METHOD."""
    student, nets = Attentive(task.model, task.inputs), [Attentive(model, task.inputs) for model in task.models]
    K, size = task.classes, student.size

    def train(ctx, params, data):
        """Params, loss, and how many examples of each class [K] it trained on."""
        supervise = supervised(ctx.model, task.training)
        return fit_observing(
            task.training, lambda *args: (supervise(*args), ()), lambda _, y, weight: weight @ jax.nn.one_hot(y, K),
            jnp.zeros(K), params, data, ctx.at("train"), epochs=local_work(ctx),
        )  # fmt: skip

    def train_and_look(ctx, received, params, data):
        params, loss, counts = train(ctx, params, data)
        net, ids = nets[ctx.cohort], proxy.positions(ctx.proxy, received.shared)

        def look(x):
            h = net.features(params, x)
            return jnp.concatenate([net.logits(params, h), net.maps(params, h, size).reshape(len(x), -1)], 1)

        seen = testing.predict(look, ctx.proxy._replace(x=ctx.proxy.x[ids], y=ctx.proxy.y[ids]), _BATCH)
        upload = {"logits": seen[:, :K], "maps": seen[:, K:].reshape(-1, K, *size), "counts": counts}
        return params, Upload(upload), {"train_loss": loss}

    def distil(ctx, server, summary):
        logits = jnp.where(summary["held"].reshape(1, K) > 0, summary["by_class"], summary["plain"])

        def loss(params, x, target, key):
            teacher, least, most = target
            h = student.features(params, x, key)
            apart = outside(student.maps(params, h, size), least, most)
            z = student.logits(params, h, key)
            return losses.kl_divergence(teacher, z) + ctx.hparams["attention_weight"] * apart

        targets = proxy.targets(ctx, server.ids, (logits, summary["least"], summary["most"]))
        distilling = of_stage(ctx, "distill")
        params, server_loss = fit(task.distilling, loss, server.params, targets, ctx.at("distil"), **distilling)
        return _Server(params, proxy.draw_ids(task, ctx.at("ids").key)), {"server_loss": server_loss}

    by_class = after(lambda ctx, sent: (sent["logits"], sent["counts"].reshape(1, K)), reductions.elementwise_mean())
    reduce = {
        "by_class": by_class,
        "plain": reductions.mean(lambda sent: sent["logits"]),
        "least": reductions.minimum(lambda sent: sent["maps"]),
        "most": reductions.maximum(lambda sent: sent["maps"]),
        "held": reductions.maximum(lambda sent: sent["counts"]),
    }
    return Algorithm(
        init_server=lambda ctx, params: _Server(params, proxy.draw_ids(task, ctx.key)),
        init_client=own_model,
        round=(Exchange(lambda ctx, server: Broadcast(server.ids), train_and_look, reduce, distil),),
        central=lambda ctx, server, x: ctx.model.apply(server.params, x),
        personal=predict_with_own_model,
    )


METHOD = Method(
    name="fedad",
    summary="FedAD (Gong et al. 2021): one shot, logits by class and attention maps on proxy data, to a student",
    build=fedad,
    hparams={
        **LOCAL_TRAINING,
        "local_epochs": epochs(20),
        "distill_learning_rate": learning_rate("learning_rate", "learning rate of the student"),
        "distill_epochs": epochs(20, "epochs of the student over the proxy data"),
        "attention_weight": HParam(1.0, help="lambda: weight of attention outside of what clients see"),
    },
    proxy="unlabelled",
    parts=True,
    stages=("distill",),
    keeps_models=True,
    distils=True,
)
