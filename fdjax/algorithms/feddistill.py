"""FedDistill of Jiang, Shan and Zhang (not FD, which FedGen calls by the same name).

Jiang, Shan, Zhang, "Federated Learning Algorithm Based on Knowledge Distillation" (2020), Algorithm 1 and equation 3.
Client i holds a personal model Gamma_i of any architecture, the teacher, and a copy theta_i of the global model, the
student.

    q = softmax(Gamma_i(x) / T)                                                       (3)
    theta_i <- w_t;  for E epochs, for each batch b:  theta_i <- theta_i - eta grad l(theta_i, b, q)      (lines 8-14)
    w_{t+1} = sum_k (n_k / n) theta_k                                                 (line 7)

Sent: w_t down and theta_i up, 4P(theta) bytes each way; Gamma_i never leaves its client and persists across rounds.

The paper leaves open, and we chose:
- l(theta, b, q) = (1 - weight) CE(softmax(theta(x)), y) + weight T^2 KL(q || softmax(theta(x) / T)), the loss of
  Hinton et al. (2015), which the paper cites; weight = 0.5, T = 2. `weight` and `temperature` are traced.
- Gamma_i starts from a random initialisation of its own and is trained by CE on the client's data for `teacher_epochs`
  epochs (E unless set) just before each distillation, with the same optimiser and batch size.
- Line 7 sums over all K nodes; the sum here is over the round's participants, as in FedAvg. They are
  drawn from each cohort apart, at least one each.
"""

from jax import lax

from fdjax import keys
from fdjax.client import local, losses
from fdjax.exchange import reductions
from fdjax.types import Algorithm

HPARAMS: dict[str, float | str] = {
    "learning_rate": 0.01,
    "local_epochs": 1,
    "temperature": 2.0,
    "weight": 0.5,
    "teacher_learning_rate": "learning_rate",
    "teacher_epochs": "local_epochs",
}


def feddistill(task: local.Task) -> Algorithm:
    """FedDistill of the task's model, the student, a cohort's model being the teacher of its clients.

    hparams: `learning_rate` (eta), `local_epochs` (E), `temperature` (T), `weight` (of the distillation loss, in
    [0, 1]), `teacher_learning_rate`, `teacher_epochs`.
    """
    student, training = task.model, task.training

    def client(teacher, broadcast, teacher_params, data, proxy, hparams, key):
        temperature, weight = hparams["temperature"], hparams["weight"]

        def teacher_loss(params, x, y):
            return losses.cross_entropy(teacher.apply(params, x), y)

        def distill_loss(params, x, y):
            logits = student.apply(params, x)
            hard = losses.cross_entropy(logits, y)
            soft = losses.kl_divergence(lax.stop_gradient(teacher.apply(teacher_params, x)), logits, temperature)
            return (1 - weight) * hard + weight * temperature**2 * soft

        teacher_params, teacher_train_loss = local.fit(
            training,
            teacher_loss,
            teacher_params,
            data,
            hparams | {"learning_rate": hparams["teacher_learning_rate"]},
            keys.stream(key, "teacher"),
            epochs=hparams["teacher_epochs"],
        )
        params, train_loss = local.fit(
            training,
            distill_loss,
            broadcast,
            data,
            hparams,
            keys.stream(key, "student"),
            epochs=hparams["local_epochs"],
        )
        return teacher_params, params, {"train_loss": train_loss, "teacher_loss": teacher_train_loss}

    def server(params, mean, proxy, hparams, key):
        return mean, {}

    return Algorithm(
        name="feddistill",
        hparams=HPARAMS,
        init_server=student.init,
        init_client=lambda teacher, key: teacher.init(key),
        broadcast=lambda params, cohort: params,
        client=client,
        reduction=reductions.weighted_mean(),
        server=server,
        central=(student, lambda params: params),
        personal=lambda teacher_params: teacher_params,
    )
