"""pfl (Apple): FederatedAveraging on a SimulatedBackend, with a PyTorchModel and one process."""

import time
from importlib import metadata

import pfl.model.pytorch  # isort: skip  before the rest of pfl, which asks it for its tensors
import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data import FederatedDataset
from pfl.data.dataset import Dataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from torch import nn
from torch_net import fastest_threads, from_torch, make_net, scaled, set_params, tensors_of, to_torch
from worker import serve, under


class Net(nn.Module):
    """A net with the two functions that pfl asks of it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def loss(self, x, y):
        return nn.functional.cross_entropy(self.net(x), y)

    @torch.no_grad()
    def metrics(self, x, y):
        return {"loss": Weighted(self.loss(x, y).item() * len(y), len(y))}


class Simulation:
    def version(self):
        return {"version": f"{metadata.version('pfl')} with torch {torch.__version__}"}

    def load(self, path, lr, padding, device, distill):
        data = np.load(path)
        self.like = under(data, "params")
        self.first = to_torch(self.like)
        net = Net(make_net(self.like, padding))
        self.model = pfl.model.pytorch.PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
        clients, _, batch = data["batches"].shape
        x, y = scaled(tensors_of(data["x"])), torch.from_numpy(data["y"]).long()
        # The examples of a user lie in the order of its batches, which pfl cuts once and keeps.
        users = [Dataset((x[rows], y[rows])) for rows in torch.from_numpy(data["batches"]).long().flatten(1)]
        del x, y
        sampler = get_user_sampler("minimize_reuse", list(range(clients)))
        dataset = FederatedDataset(lambda user: users[user], sampler)
        self.backend = SimulatedBackend(dataset, dataset)
        self.training = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=lr, local_batch_size=batch)
        self.algorithm, self.clients, self.rounds = FederatedAveraging(), clients, 0
        return {"note": f"threads: {fastest_threads(self.run)}"}

    def run(self, clients=None):
        """One more iteration. pfl evaluates at iteration 0, which is in the warm-up, and then never again here."""
        set_params(self.model.pytorch_model, self.first)
        self.rounds += 1
        start = time.perf_counter()
        self.algorithm.run(
            NNAlgorithmParams(
                self.rounds,
                evaluation_frequency=1 << 30,
                train_cohort_size=min(clients or self.clients, self.clients),
                val_cohort_size=0,
            ),
            self.backend,
            self.model,
            self.training,
            NNEvalHyperParams(local_batch_size=None),
            send_metrics_to_platform=False,
        )
        return {"seconds": time.perf_counter() - start}

    def save(self, path):
        np.savez(path, **from_torch(self.model.pytorch_model.parameters(), self.like))


if __name__ == "__main__":
    serve(Simulation())
