"""FedZKT: knowledge between devices of any architectures, without data, by way of a generator and a global model.

Zhang, Wu, Yuan, "FedZKT: Zero-Shot Knowledge Transfer towards Resource-Constrained Federated Learning with
Heterogeneous On-Device Models" (ICDCS 2022). We had its abstract and a survey's lines, so what stands here in equations
is our concretisation. f_k are the devices' models, F the global one, G(z) a generator of inputs from noise.

    client:  E epochs of CE(f_k) + (mu / 2) |w_k - w_k'|^2, w_k' the params that it received
    server:  with x = G(z),  SL(x) = |softmax(F(x)) - (1/S) sum_k softmax(f_k(x))|_1,
             `server_steps` times: a step of Adam on G that raises mean SL, `student_steps` of SGD on F that lower it
             `device_steps` times, for all k: SGD on w_k of KL(softmax(F(x)) || softmax(f_k(x))); the w_k go back

Sent: w_k up, and from a client's second round on its own w_k' down, 4P_k each way. The server keeps all devices'
models. A client predicts by the model that it trained last, the central model is F.

Ours: everything above beside SL and that there is a proximal term; G is dense (`exchange/inputs.py`) and goes on from
round to round, its Adam begins anew; noise is new in each step, batches have 50. In `test_learning.py` F has 0.560,
0.428, 0.416 and devices 0.234, 0.244, 0.243, as alone (0.230, 0.249, 0.235): an epoch on one or two labels unlearns it.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdjax.client import losses
from fdjax.client.distillation import note
from fdjax.client.trained import on_trained
from fdjax.client.training import train_locally
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload, own_model, predict_with_own_model
from fdjax.exchange import inputs, reductions, traffic
from fdjax.exchange.stacked import apply_each, present
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, epochs, learning_rate

_BATCH = 50


def fedzkt(task: Task) -> Algorithm:
    """FedZKT; the task's model is F, the cohorts' are the devices'; hparams: see METHOD."""
    shape, central = task.inputs, task.model.apply

    def broadcast(ctx, server):
        return Broadcast((), own=(server["known"][task.ids(ctx.cohort)], server["devices"][ctx.cohort]))

    def train(ctx, received, own, data):
        known, sent = received.own
        start = jax.tree.map(lambda a, b: jnp.where(known > 0, a, b), sent, own)
        params, loss = train_locally(
            task.training, start, data, ctx,
            pull=lambda w: jax.tree.map(lambda a, b: ctx.hparams["mu"] * (a - b), w, start),
        )  # fmt: skip
        return params, Upload(params, bytes_received=known * traffic.size(sent)), {"train_loss": loss}

    def say(devices, x):
        """softmax(f_k(x)) [S, B, K] of the devices of all cohorts."""
        each = [apply_each(model.apply, params, x) for model, params in zip(task.models, devices, strict=True)]
        return jax.nn.softmax(jnp.concatenate(each))

    def serve(ctx, server, stacks):
        there = jnp.concatenate([stack.weight for stack in stacks]) > 0
        devices = [present(stack) for stack in stacks]
        adam = optax.adam(ctx.hparams["generator_learning_rate"])
        of_central = optax.sgd(ctx.hparams["server_learning_rate"])
        of_central = on_trained(of_central, server["params"], task.serving.trained)

        def generate(made, purpose, *numbers):
            return inputs.generate(made, inputs.draw(ctx.at(purpose, *numbers).key, _BATCH), None, shape)

        def apart(params, x, key=None):
            mean = jnp.tensordot(there / jnp.sum(there), say(devices, x), 1)
            return jnp.mean(jnp.sum(jnp.abs(jax.nn.softmax(central(params, x, key)) - mean), -1))

        def play(i, carry):
            made, state, params, _ = carry
            slope = jax.grad(lambda made: -apart(params, generate(made, "generator", i)))(made)
            update, state = adam.update(slope, state)
            made = optax.apply_updates(made, update)

            def learn(j, carry):
                params, _ = carry
                x = generate(made, "student", i, j)
                value, slope = jax.value_and_grad(apart)(params, x, ctx.at("net", i, j).key)
                update, _ = of_central.update(slope, of_central.init(params), params)
                return optax.apply_updates(params, update), value

            return made, state, *lax.fori_loop(0, ctx.hparams["student_steps"], learn, (params, jnp.float32(0)))

        start = server["generator"], adam.init(server["generator"]), server["params"], jnp.float32(0)
        made, _, params, value = lax.fori_loop(0, ctx.hparams["server_steps"], play, start)
        note(ctx, server["params"], params)
        sgd = optax.sgd(ctx.hparams["device_learning_rate"] / _BATCH)
        of_devices = [on_trained(sgd, each, task.serving.trained) for each in devices]

        def hand_down(i, devices):
            """Each device's own step, as the sum of their losses has each one's slope."""
            x = generate(made, "device", i)
            target = jax.nn.softmax(central(params, x))
            new = []
            for model, each, optimizer in zip(task.models, devices, of_devices, strict=True):

                def loss(each, model=model):
                    return jnp.sum(losses.soft_cross_entropy(target[None], apply_each(model.apply, each, x)))

                update, _ = optimizer.update(jax.grad(loss)(each), optimizer.init(each), each)
                new.append(optax.apply_updates(each, update))
            return new

        devices = lax.fori_loop(0, ctx.hparams["device_steps"], hand_down, devices)
        tables, known = [], server["known"]
        for j, (table, stack, each) in enumerate(zip(server["devices"], stacks, devices, strict=True)):
            row = jnp.where(stack.weight > 0, stack.client - task.ids(j).start, task.sizes[j])
            tables.append(jax.tree.map(lambda old, new, row=row: old.at[row].set(new, mode="drop"), table, each))
            known = known.at[stack.client].max((stack.weight > 0).astype(jnp.float32))
        new = {"params": params, "generator": made, "devices": tuple(tables), "known": known}
        return new, {"distill_loss": value}

    def init_server(ctx, params):
        shapes = [jax.eval_shape(model.init, jax.random.key(0)) for model in task.models]
        tables = [
            jax.tree.map(lambda leaf, size=size: jnp.zeros((size, *leaf.shape), leaf.dtype), shape)
            for shape, size in zip(shapes, task.sizes, strict=True)
        ]
        made = inputs.init(ctx.at("generator").key, 0, shape)
        return {"params": params, "generator": made, "devices": tuple(tables), "known": jnp.zeros(task.clients)}

    return Algorithm(
        init_server=init_server,
        init_client=own_model,
        round=(Exchange(broadcast, train, reductions.stack()._replace(per_cohort=True), serve, shares="params"),),
        central=lambda ctx, server, x: central(server["params"], x),
        personal=predict_with_own_model,
    )


METHOD = Method(
    name="fedzkt",
    summary="FedZKT (Zhang et al. 2022): models of any architectures, taught at the server on generated inputs",
    build=fedzkt,
    hparams={
        **LOCAL_TRAINING,
        "mu": HParam(0.1, help="weight of the proximal term"),
        "generator_learning_rate": learning_rate(0.01, "learning rate of the generator"),
        "server_learning_rate": learning_rate(0.1, "learning rate of the global model"),
        "device_learning_rate": learning_rate(0.01, "learning rate of devices' models at the server"),
        "server_steps": epochs(50, "times that generator and global model train in a round"),
        "student_steps": epochs(5, "steps of the global model in each of them"),
        "device_steps": epochs(50, "steps of each device's model at the server in a round"),
    },
    needs_numbers=True,
    distils=True,
)
