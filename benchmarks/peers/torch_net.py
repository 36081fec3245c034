"""What the workers in PyTorch share: fdjax's weights as a PyTorch net and back, and the number of threads."""

import math

import numpy as np
import torch
from torch import nn
from worker import layers

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


def set_params(net, values):
    with torch.no_grad():
        for p, value in zip(net.parameters(), values, strict=True):
            p.copy_(value)
