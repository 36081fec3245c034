"""PyTorch: clients one after another, each a plain eager training loop, on the faster of one thread and one a core."""

import math
import time

import numpy as np
import torch
from torch import nn
from worker import layers, serve, under

PROBE = 8  # clients on which the number of threads is chosen


def make_net(params, padding):
    """The net whose weights `params` are: convolutions, the first two pooled, then dense layers."""
    net = []
    names = layers(params)
    for index, name in enumerate(n for n in names if n.startswith("Conv")):
        height, width, channels, out = params[f"{name}/kernel"].shape
        net.append(nn.Conv2d(channels, out, (height, width), padding="same" if padding == "SAME" else 0))
        net += [nn.MaxPool2d(2)] if index < 2 else []
        net.append(nn.ReLU())
    net.append(nn.Flatten())
    for name in (n for n in names if n.startswith("Dense")):
        net += [nn.Linear(*params[f"{name}/kernel"].shape), nn.ReLU()]
    return nn.Sequential(*net[:-1])


def images(params):
    """Name of the dense layer that follows a convolution, and the (height, width, channels) that it flattens."""
    convs = [name for name in layers(params) if name.startswith("Conv")]
    if not convs:
        return None, ()
    channels = params[f"{convs[-1]}/kernel"].shape[-1]
    side = math.isqrt(params["Dense_0/kernel"].shape[0] // channels)
    return "Dense_0", (side, side, channels)


def to_torch(params):
    """fdjax's arrays as PyTorch lays them out, in the order of `net.parameters()`."""
    first, shape = images(params)
    tensors = []
    for name in layers(params):
        kernel = params[f"{name}/kernel"]
        if kernel.ndim == 4:
            kernel = kernel.transpose(3, 2, 0, 1)
        elif name == first:
            kernel = kernel.reshape(*shape, -1).transpose(3, 2, 0, 1).reshape(kernel.shape[1], -1)
        else:
            kernel = kernel.T
        tensors += [torch.from_numpy(np.array(kernel, order="C")), torch.from_numpy(params[f"{name}/bias"])]
    return tensors


def from_torch(tensors, like):
    """The way back, to the names and shapes of `like`."""
    first, shape = images(like)
    arrays, params = [t.detach().cpu().numpy() for t in tensors], {}
    for name, kernel, bias in zip(layers(like), arrays[::2], arrays[1::2], strict=True):
        if kernel.ndim == 4:
            kernel = kernel.transpose(2, 3, 1, 0)
        elif name == first:
            height, width, channels = shape
            kernel = kernel.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(-1, len(kernel))
        else:
            kernel = kernel.T
        params |= {f"{name}/kernel": kernel, f"{name}/bias": bias}
    return params


def tensors_of(x):
    """Examples as a model takes them, channels first; images stay bytes."""
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else torch.from_numpy(x)


def scaled(x):
    return x.float() / 255 if x.dtype == torch.uint8 else x


def fastest_threads(run):
    """Set and return the number of threads, one or one a core, that is faster on a few clients, twice each."""
    taken = {}
    for threads in sorted({torch.get_num_threads(), 1}, reverse=True):
        torch.set_num_threads(threads)
        run(PROBE)
        taken[threads] = run(PROBE)["seconds"]
    best = min(taken, key=taken.get)
    torch.set_num_threads(best)
    return best


class Loop:
    """FedAvg, or the distillation of a teacher that each client holds, as a loop over clients."""

    def version(self):
        return {"version": torch.__version__}

    def load(self, path, lr, padding, device, distill):
        data = np.load(path)
        self.device = "cuda" if device == "gpu" else "cpu"
        self.like, teachers = under(data, "params"), under(data, "teacher")
        self.net = make_net(self.like, padding).to(self.device)
        self.teacher = make_net(self.like, padding).to(self.device) if distill else None
        self.first = [t.to(self.device) for t in to_torch(self.like)]
        self.teachers = [
            [t.to(self.device) for t in to_torch({name: value[client] for name, value in teachers.items()})]
            for client in range(len(data["batches"]) if distill else 0)
        ]
        self.x, self.y = tensors_of(data["x"]).to(self.device), torch.from_numpy(data["y"]).long().to(self.device)
        self.batches = torch.from_numpy(data["batches"]).long().to(self.device)
        self.lr, self.distill = lr, distill
        if self.device == "cuda":
            self.run(PROBE)
            return {"note": torch.cuda.get_device_name()}
        return {"note": f"threads: {fastest_threads(self.run)}"}

    def run(self, clients=None):
        start = time.perf_counter()
        total = [torch.zeros_like(p) for p in self.first]
        for client, batches in enumerate(self.batches[:clients]):
            self.client(client, batches)
            with torch.no_grad():
                for t, p in zip(total, self.net.parameters(), strict=True):
                    t += p
        self.mean = [t / len(self.batches) for t in total]
        if self.device == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start}

    def client(self, client, batches):
        set_params(self.net, self.first)
        if self.teacher is not None:
            set_params(self.teacher, self.teachers[client])
        optimizer = torch.optim.SGD(self.net.parameters(), lr=self.lr)
        for index in batches:
            optimizer.zero_grad()
            self.loss(scaled(self.x[index]), self.y[index]).backward()
            optimizer.step()

    def loss(self, x, y):
        logits = self.net(x)
        hard = nn.functional.cross_entropy(logits, y)
        if self.teacher is None:
            return hard
        temperature, weight = self.distill["temperature"], self.distill["weight"]
        with torch.no_grad():
            log_q = nn.functional.log_softmax(self.teacher(x) / temperature, dim=1)
        log_p = nn.functional.log_softmax(logits / temperature, dim=1)
        soft = nn.functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return (1 - weight) * hard + weight * temperature**2 * soft

    def save(self, path):
        np.savez(path, **from_torch(self.mean, self.like))


def set_params(net, values):
    with torch.no_grad():
        for p, value in zip(net.parameters(), values, strict=True):
            p.copy_(value)


if __name__ == "__main__":
    serve(Loop())
