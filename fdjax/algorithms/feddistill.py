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

from fdjax.client import losses
from fdjax.client.training import fit, local_work, of_stage, train_locally
from fdjax.contract import Algorithm, Upload
from fdjax.exchange import averaging
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, epochs, learning_rate, temperature


def feddistill(task: Task) -> Algorithm:
    """FedDistill of the task's model, the student, a cohort's model being the teacher of its clients.

    hparams: `learning_rate` (eta), `local_epochs` (E), `temperature` (T), `weight` (of the distillation loss, in
    [0, 1]), `teacher_learning_rate`, `teacher_epochs`.
    """
    student, training = task.model, task.training

    def distil(ctx, received, teacher_params, data):
        T, weight, teacher = ctx.hparams["temperature"], ctx.hparams["weight"], ctx.model

        def distillation(params, x, y, key):
            logits = student.apply(params, x, key)
            hard = losses.cross_entropy(logits, y, training.label_smoothing)
            soft = losses.kl_divergence(lax.stop_gradient(teacher.apply(teacher_params, x)), logits, T)
            return (1 - weight) * hard + weight * T**2 * soft

        teacher_params, teacher_loss = train_locally(
            training, teacher_params, data, ctx.at("teacher"), **of_stage(ctx, "teacher")
        )
        params, loss = fit(
            training, distillation, received.shared, data, ctx.at("student"), epochs=local_work(ctx), keeps=False
        )
        return teacher_params, Upload(params), {"train_loss": loss, "teacher_loss": teacher_loss}

    return averaging.beside_own_models(averaging.exchange(distil))


METHOD = Method(
    name="feddistill",
    summary="FedDistill (Jiang et al. 2020): a personal teacher for the central model",
    build=feddistill,
    hparams={
        **LOCAL_TRAINING,
        "temperature": temperature(2.0, "softens teacher and student in the distillation loss"),
        "weight": HParam(0.5, high=1.0, help="weight of the distillation loss; the rest is the labels'"),
        "teacher_learning_rate": learning_rate("learning_rate", "learning rate of the teachers"),
        "teacher_epochs": epochs("local_epochs", "epochs of the teachers in a round, whatever --local_steps"),
    },
)
