"""PyTorch's side of benchmarks.speed: clients one after another, each a plain eager training loop on all cores.

A worker: one JSON request a line on stdin, one answer a line on stdout. Runs in a venv of its own (make bench-venv),
without fdjax.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn


class Flatten(nn.Module):
    """Channels last, as fdjax flattens, so that the weights of the next layer are the same."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x.flatten(1)


def make_net(model, size, padding):
    """The net of `fdjax.models` with the layer sizes of its weights."""
    same = padding == "SAME"
    layers = []
    convs = [name for name in size if name.startswith("Conv")]
    pooled = {"cnn1": 2, "niid_cnn": 2, "2nn": 0}[model]
    for index, name in enumerate(convs):
        height, width, channels, out = size[name]
        layers.append(nn.Conv2d(channels, out, (height, width), padding="same" if same else 0))
        layers += [nn.MaxPool2d(2)] if index < pooled else []
        layers.append(nn.ReLU())
    layers.append(Flatten())
    dense = [name for name in size if name.startswith("Dense")]
    for name in dense:
        layers += [nn.Linear(*size[name]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Training:
    """One model, its examples and batches; `run` times a round of all clients."""

    def load(self, path, model, lr, padding="VALID"):
        data = np.load(path)
        names = sorted({name.rsplit("/", 1)[0] for name in data.files if "/" in name})
        self.net = make_net(model, {n: data[f"{n}/kernel"].shape for n in names}, padding)
        self.x = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).contiguous()
        self.y = torch.from_numpy(data["y"]).long()
        self.batches = torch.from_numpy(data["batches"]).long()
        self.lr = lr
        self.first = []
        for name in names:
            kernel = torch.from_numpy(data[f"{name}/kernel"])
            kernel = kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
            self.first += [kernel.contiguous(), torch.from_numpy(data[f"{name}/bias"])]
        return {}

    def run(self):
        start = time.perf_counter()
        total = [torch.zeros_like(p) for p in self.first]
        means = [self.client(batches, total) for batches in self.batches]
        return {"seconds": time.perf_counter() - start, "loss": means}

    def client(self, batches, total):
        params = list(self.net.parameters())
        with torch.no_grad():
            for p, first in zip(params, self.first):
                p.copy_(first)
        optimizer = torch.optim.SGD(params, lr=self.lr)
        losses = []
        for index in batches:
            x = self.x[index].float() / 255
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.net(x), self.y[index])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        with torch.no_grad():
            for t, p in zip(total, params):
                t += p
        return torch.stack(losses).mean().item()


def main():
    training = Training()
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        if do == "version":
            answer = {"version": f"{torch.__version__} ({torch.get_num_threads()} threads)"}
        else:
            answer = getattr(training, do)(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
