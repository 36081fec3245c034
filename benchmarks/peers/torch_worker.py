"""PyTorch: clients one after another, each a plain eager training loop, on the faster of one thread and one a core."""

import time

import numpy as np
import torch
from torch import nn
from torch_net import PROBE, fastest_threads, from_torch, make_net, scaled, set_params, tensors_of, to_torch
from worker import serve, under


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


if __name__ == "__main__":
    serve(Loop())
